"""Column types that hold the same values on SQLite and on PostgreSQL.

SQLite enforces no length and knows one integer, of 64 bits. What it takes PostgreSQL must take too: an instance of 3 GB, an odd
Modality, a figure that is NaN must not be a failure of the database there and a row here.
"""

from __future__ import annotations

import json
from typing import Any

from sqlalchemy import JSON, BigInteger, Dialect, Integer, String, Text
from sqlalchemy.types import TypeDecorator, TypeEngine

_POSTGRESQL = "postgresql"


class _JsonText(TypeDecorator[Any]):
    """JSON as Python writes it, in a text column: PostgreSQL's own type refuses NaN and infinity, which SQLite's keeps."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> str:
        """To the database."""
        del dialect
        return json.dumps(value)

    def process_result_value(self, value: Any, dialect: Dialect) -> Any:
        """From the database."""
        del dialect
        return json.loads(value)


class _AnyText(TypeDecorator[str]):
    """Text without a limit; NUL, which PostgreSQL cannot hold and a damaged attribute can, becomes U+FFFD."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        """To the database."""
        del dialect
        return None if value is None else value.replace("\0", "\N{REPLACEMENT CHARACTER}")


def string(length: int) -> TypeEngine[str]:
    """Text of about this length; the length is documentation."""
    return String(length).with_variant(_AnyText(), _POSTGRESQL)


def text() -> TypeEngine[str]:
    """Text of any length."""
    return Text().with_variant(_AnyText(), _POSTGRESQL)


def integer() -> TypeEngine[int]:
    """64 bits, signed."""
    return Integer().with_variant(BigInteger(), _POSTGRESQL)


def json_value() -> TypeEngine[Any]:
    """Anything that `json.dumps` writes."""
    return JSON().with_variant(_JsonText(), _POSTGRESQL)

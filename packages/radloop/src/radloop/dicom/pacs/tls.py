"""TLS towards a PACS (PS3.15 Annex B): its certificate is checked, and ours is shown where it asks for one."""

from __future__ import annotations

import ssl
from pathlib import Path

from radloop.errors import SettingsError


def tls_context(ca: Path | None = None, certificate: Path | None = None, key: Path | None = None) -> ssl.SSLContext:
    """TLS 1.2 or newer.

    Args:
        ca: PEM file of who signed the PACS's certificate; None: who this system trusts.
        certificate: ours, for mutual TLS, PEM.
        key: of `certificate`; None: it is in the same file.

    Raises:
        SettingsError: a file cannot be read.
    """
    try:
        context = ssl.create_default_context(cafile=ca)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if certificate is not None:
            context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        raise SettingsError(
            "the TLS files of a PACS cannot be used",
            expected="PEM files: ca, certificate, key",
            got=type(error).__name__,
            next_step="check the paths under [pacs.NAME] in radloop.toml",
        ) from None
    return context

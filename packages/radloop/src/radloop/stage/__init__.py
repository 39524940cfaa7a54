"""Stages: plain typed functions whose inputs and outputs are artifacts.

    @stage
    def quality(clean: In[Instances], checked: Out[Instances], *, home: Home, workers: int = 1) -> None: ...

Artifacts are positional, parameters keyword-only and JSON-able. `Home` is the project's home directory, given by the
engine and part of no digest. A `Secret` is a reference (`env:NAME`, `file:PATH`), never a value.
"""

from __future__ import annotations

import importlib
import inspect
import types
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeAlias, TypeVar, Union, get_args, get_origin, get_type_hints, overload

import msgspec

from radloop.artifact import Artifact, Kind, Output
from radloop.errors import DefinitionError

K = TypeVar("K", bound=Kind)

In: TypeAlias = Annotated[Artifact[K], "in"]
Out: TypeAlias = Annotated[Output[K], "out"]
Home: TypeAlias = Annotated[Path, "home"]
Secret: TypeAlias = Annotated[str, msgspec.Meta(pattern="^(env:[A-Za-z_][A-Za-z0-9_]*|file:.+)$")]


class Port(msgspec.Struct, frozen=True):
    """An artifact a stage reads or writes."""

    name: str
    kind: type[Kind]
    optional: bool = False
    each: bool = False


class Stage:
    """A declared stage. Calling it calls the function.

    Attributes:
        ref: `module:function`, how engines name it.
        inputs, outputs: its ports, by name.
        params: type and default of each parameter; `inspect.Parameter.empty` where none.
        environment: the environment whose Python runs it (`core`, `tfdv`).
        cache: False for a stage that looks at the world (what has arrived, what was approved): it always runs.
        retries: how often a failed try is repeated.
        timeout_s: after this many seconds a try is ended and counts as failed.
        resources: requests such as `{"cpu": "2", "memory": "4Gi"}`, for engines that schedule.
    """

    def __init__(
        self,
        function: Callable[..., None],
        *,
        environment: str = "core",
        cache: bool = True,
        retries: int = 0,
        timeout_s: float | None = None,
        resources: dict[str, str] | None = None,
    ) -> None:
        self.function = function
        self.name = function.__name__
        self.ref = f"{function.__module__}:{function.__name__}"
        self.environment, self.cache, self.retries = environment, cache, retries
        self.timeout_s, self.resources = timeout_s, dict(resources or {})
        self.inputs: dict[str, Port] = {}
        self.outputs: dict[str, Port] = {}
        self.params: dict[str, tuple[Any, Any]] = {}
        self.home: str | None = None
        self.__doc__ = function.__doc__
        self.__module__ = function.__module__
        self._read_signature()

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Call the function itself."""
        self.function(*args, **kwargs)

    def _read_signature(self) -> None:
        hints = get_type_hints(self.function, include_extras=True)
        for name, parameter in inspect.signature(self.function).parameters.items():
            if name not in hints:
                raise self._wrong(f"parameter {name!r} has no type", "In[...], Out[...] or a JSON-able type")
            if parameter.kind is not parameter.KEYWORD_ONLY:
                self._add_port(name, hints[name], parameter)
            elif hints[name] == Home:
                self.home = name
            else:
                self.params[name] = (hints[name], self._default(name, hints[name], parameter.default))

    def _add_port(self, name: str, hint: Any, parameter: inspect.Parameter) -> None:
        optional = get_origin(hint) in (Union, types.UnionType) and type(None) in get_args(hint)
        if optional:
            hint = next(a for a in get_args(hint) if a is not type(None))
        marks = getattr(hint, "__metadata__", ())
        if marks[-1:] == ("in",):
            kind, each = _kind(get_args(get_args(hint)[0])[0])
            self.inputs[name] = Port(name, kind, optional, each)
        elif marks[-1:] == ("out",) and not optional:
            self.outputs[name] = Port(name, get_args(get_args(hint)[0])[0])
        else:
            raise self._wrong(
                f"positional parameter {name!r} is no artifact",
                "In[Kind], In[Kind] | None or Out[Kind]; parameters go after a bare *",
            )

    def _default(self, name: str, hint: Any, default: Any) -> Any:
        if default is inspect.Parameter.empty:
            return default
        try:
            return msgspec.convert(plain(default), hint)
        except (TypeError, msgspec.ValidationError) as error:
            raise self._wrong(f"the default of {name!r} does not fit its type: {error}", hint) from None

    def check_params(self, values: dict[str, Any]) -> dict[str, Any]:
        """Fill defaults in and convert JSON values to the declared types.

        Raises:
            DefinitionError: an unknown, missing or ill-typed parameter.
        """
        if unknown := sorted(set(values) - set(self.params)):
            raise self._wrong(f"no parameter {', '.join(unknown)}", sorted(self.params) or "none")
        full = {}
        for name, (hint, default) in self.params.items():
            value = values.get(name, default)
            if value is inspect.Parameter.empty:
                raise self._wrong(f"parameter {name!r} is missing", hint)
            try:
                full[name] = msgspec.convert(plain(value), hint)
            except msgspec.ValidationError as error:
                if hint == Secret:  # it may be the secret itself: never repeat it
                    raise self._wrong(f"{name!r} is no secret reference", "env:NAME or file:PATH") from None
                raise self._wrong(f"parameter {name!r} does not fit: {error}", hint, got=repr(value)) from None
        return full

    def _wrong(self, what: str, expected: object, got: object = None) -> DefinitionError:
        return DefinitionError(f"stage {self.name}: {what}", expected=expected, got=got)


def plain(value: Any) -> Any:
    """A value as JSON would bring it: a tuple becomes a list, a struct a dict."""
    return msgspec.json.decode(msgspec.json.encode(value))


def _kind(hint: Any) -> tuple[type[Kind], bool]:
    """The kind a port names, and whether it is an `Each` of it."""
    if get_origin(hint) is not None:
        return get_args(hint)[0], True
    return hint, False


@overload
def stage(function: Callable[..., None], /) -> Stage: ...
@overload
def stage(
    *,
    environment: str = ...,
    cache: bool = ...,
    retries: int = ...,
    timeout_s: float | None = ...,
    resources: dict[str, str] | None = ...,
) -> Callable[[Callable[..., None]], Stage]: ...
def stage(function: Callable[..., None] | None = None, /, **options: Any) -> Any:
    """Declare a stage; see `Stage` for the options. A wrong signature is a DefinitionError at import."""
    if function is not None:
        return Stage(function)
    return lambda f: Stage(f, **options)


def load(ref: str) -> Stage:
    """The stage that `module:function` names. Raises DefinitionError if there is none."""
    module, _, name = ref.partition(":")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        raise DefinitionError(
            f"stage {ref!r} cannot be imported: {error}",
            expected="module:function in an installed package",
            next_step="check that this environment is the one the stage names (radloop doctor)",
        ) from None
    if not isinstance(found, Stage):
        raise DefinitionError(f"{ref!r} is no stage", expected="a function under @stage", got=type(found).__name__)
    return found

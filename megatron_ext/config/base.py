"""The base of every knob: frozen, keyword-only, strict dataclasses that go to JSON and back.

    @config
    class Budget:
        steps: int
        sequence_length: int = 8192

An unknown key names the nearest right one; an ill-typed value names the key, the value and the
type that was expected. A default lives in the field and nowhere else.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import json
from collections.abc import Callable
from typing import Any, TypeVar, dataclass_transform

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass

from megatron_ext.errors import ConfigError

T = TypeVar("T")
Json = dict[str, Any]


@dataclass_transform(kw_only_default=True, frozen_default=True)
def config(cls: type[T]) -> type[T]:
    """Make `cls` a frozen, strict, keyword-only dataclass whose mistakes raise `ConfigError`."""
    rules = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=False)
    made: Any = pydantic_dataclass(config=rules, frozen=True, kw_only=True, slots=True)(cls)
    build = made.__init__

    @functools.wraps(build)
    def checked(self: Any, *positional: Any, **values: Any) -> None:
        if positional:
            raise ConfigError(f"{cls.__name__} takes its fields by name, not by position")
        try:
            build(self, **values)
        except ValidationError as error:
            raise ConfigError(explain(made, error)) from None

    made.__init__ = checked
    return made  # type: ignore[no-any-return]


def adapter(kind: Any) -> TypeAdapter[Any]:
    """The validator of a type; built once, because building it costs milliseconds."""
    if kind not in _adapters:
        _adapters[kind] = TypeAdapter(kind)
    return _adapters[kind]


_adapters: dict[Any, TypeAdapter[Any]] = {}


def to_json(value: Any) -> Any:
    """A config as plain JSON values (dicts, lists, strings, numbers)."""
    return adapter(type(value)).dump_python(value, mode="json")


def from_json(kind: type[T] | Any, values: Any, where: str = "") -> Any:
    """Read a config back; `where` (a file or a key) opens the message of what is wrong."""
    try:
        return adapter(kind).validate_json(json.dumps(values))
    except ValidationError as error:
        raise ConfigError(explain(kind, error, where)) from None


def canonical(values: Any) -> str:
    """JSON text that is the same for equal values: sorted keys, no spaces."""
    return json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def content_hash(values: Any) -> str:
    """SHA-256 of the canonical JSON, in hex."""
    return hashlib.sha256(canonical(values).encode()).hexdigest()


def nearest(word: str, choices: list[str]) -> str:
    """' (did you mean X?)' or ' (known: ...)', to end a message about an unknown word."""
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; known: {', '.join(sorted(choices))}" if choices else ""


def field_names(kind: Any) -> list[str]:
    """Names of a config's fields, or nothing for any other type."""
    return [f.name for f in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []


def explain(kind: Any, error: ValidationError, where: str = "") -> str:
    """One readable line for each thing that pydantic found wrong."""
    lines = []
    for item in error.errors(include_url=False):
        cause = item.get("ctx", {}).get("error")
        path = ".".join(str(part) for part in item["loc"] if not str(part).startswith("function-"))
        if isinstance(cause, ConfigError):
            named = str(cause).startswith(f"{path.rpartition('.')[2]}:")  # a config's own message begins with its name
            lines.append(_at(where, path.rpartition(".")[0] if named else path, str(cause)))
        elif item["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            owner = _owner(kind, item["loc"][:-1])
            key = str(item["loc"][-1])
            name = getattr(owner, "__name__", "config")
            lines.append(_at(where, path, f"unknown key '{key}' of {name}{nearest(key, field_names(owner))}"))
        elif item["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
            lines.append(_at(where, path, "this key is required and has no default"))
        else:
            value = item.get("input")
            given = "null" if value is None else f"{repr(value)[:120]} ({type(value).__name__})"
            lines.append(_at(where, path, f"{item['msg']}, but got {given}"))
    return "\n".join(dict.fromkeys(lines))


def _at(where: str, path: str, text: str) -> str:
    return ": ".join(part for part in (where, path, text) if part)


def _owner(kind: Any, path: tuple[int | str, ...]) -> Any:
    """The config class that the keys of `path` lead to; follows fields, unions and tuples."""
    for part in path:
        options = _flatten(kind)
        by_field = [f.type for o in options for f in _fields_with_types(o) if f.name == part]
        by_tag = [o for o in options if _tag(o) == part]
        if by_field:
            kind = by_field[0]
        elif by_tag:
            kind = by_tag[0]
    options = [o for o in _flatten(kind) if dataclasses.is_dataclass(o)]
    return options[0] if options else kind


@dataclasses.dataclass(frozen=True)
class _Field:
    name: str
    type: Any


@functools.cache
def _fields_with_types(kind: Any) -> tuple[_Field, ...]:
    if not dataclasses.is_dataclass(kind):
        return ()
    from typing import get_type_hints

    hints = get_type_hints(kind)
    return tuple(_Field(f.name, hints[f.name]) for f in dataclasses.fields(kind))


def _flatten(kind: Any) -> list[Any]:
    from typing import get_args

    arguments = [a for a in get_args(kind) if a is not type(None) and a is not Ellipsis]
    return [kind] if dataclasses.is_dataclass(kind) or not arguments else [x for a in arguments for x in _flatten(a)]


def _tag(kind: Any) -> Any:
    for f in dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ():
        if f.name == "kind":
            return f.default
    return None


def override(value: T, assignments: list[str], read: Callable[[Any], T] | None = None) -> T:
    """Apply `key.key=value` assignments; every key must exist and every value must fit its type.

    The value is read as JSON where it is JSON (`3`, `1e-5`, `true`, `["a"]`) and as text otherwise.
    """
    data = to_json(value)
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals or not path:
            raise ConfigError(f"override '{assignment}': write it as key.key=value, for example stable.plan.tensor=2")
        _assign(data, path.split("."), _value(text), assignment)
    return read(data) if read else from_json(type(value), data, "override " + " ".join(assignments))


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _assign(data: Any, keys: list[str], new: Any, assignment: str) -> None:
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        here = ".".join(keys[:depth]) or "the recipe"
        if isinstance(data, list):
            names = [str(item.get("name", item.get("source", i))) if isinstance(item, dict) else str(i) for i, item in enumerate(data)]
            if key not in names and not (key.isdigit() and int(key) < len(data)):
                raise ConfigError(f"override '{assignment}': '{here}' has no '{key}'{nearest(key, names)}")
            at: Any = names.index(key) if key in names else int(key)
        elif isinstance(data, dict):
            if key not in data:
                raise ConfigError(f"override '{assignment}': '{here}' has no key '{key}'{nearest(key, list(data))}")
            at = key
        else:
            raise ConfigError(f"override '{assignment}': '{here}' is a plain value ({data!r}) and has no keys")
        if last:
            data[at] = new
        else:
            data = data[at]

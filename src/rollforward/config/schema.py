"""Nested mappings, as YAML gives them, into frozen dataclasses: typed, range-checked, all errors at once.

This module knows nothing about what the keys mean. A dataclass declares each of its keys with `key`
(default, what it means, what values it may have); `parse` walks a mapping alongside the
declarations and collects every problem instead of stopping at the first, so that a file with five
mistakes can be fixed in one go.

Not supported: references between keys, includes, environment variables. A configuration is data.
"""

import difflib
import math
import os
import reprlib
import types
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from types import MappingProxyType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from rollforward.errors import ConfigError

Section = TypeVar("Section")

_LARGEST = (1 << 63) - 1
"""Largest whole number: what the trainer's arrays can hold."""


@dataclass(frozen=True)
class Meaning:
    """What a key means and which values it may have."""

    doc: str
    low: float = -math.inf
    high: float = math.inf
    choices: tuple[str, ...] = ()
    affects_numbers: bool = True
    """Whether two runs that differ here may end with different weights."""
    is_path: bool = False
    """Whether it is a path: a leading `~` is the home folder."""


def key(
    default: Any,
    doc: str,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    choices: tuple[str, ...] = (),
    affects_numbers: bool = True,
    is_path: bool = False,
) -> Any:
    """Declare a key of a section: a dataclass field with its meaning attached."""
    meaning = Meaning(doc, low, high, choices, affects_numbers, is_path)
    return field(default=default, metadata={"meaning": meaning})


@dataclass
class Problems:
    """The problems in one source of keys, collected while it is read."""

    source: str
    """The file, as the user named it."""
    lines: Mapping[str, int]
    """Dotted key -> line of the file, counted from 1."""
    overridden: Container[str] = ()
    """Dotted keys that the command line gave."""
    found: list[str] = field(default_factory=list)
    hints: list[str] = field(default_factory=list)

    def add(self, path: str, text: str, hint: str | None = None) -> None:
        """Note a problem with the key at the dotted `path`."""
        line = self.lines.get(path)
        where = f"{self.source}:{line}" if line is not None else self.source
        if path in self.overridden:
            where = "command line"
        self.found.append(f"{where}: {path}: {text}" if path else f"{where}: {text}")
        if hint and hint not in self.hints:
            self.hints.append(hint)

    def raise_any(self) -> None:
        """ConfigError with everything collected, if there is anything."""
        if not self.found:
            return
        if len(self.found) == 1:
            message = self.found[0]
        else:
            message = f"{len(self.found)} problems in the configuration:\n" + "\n".join(
                f"  {text}" for text in self.found
            )
        raise ConfigError(message, hint="; ".join(self.hints) or "fix the value and start again")


def meaning_of(declared: "Field[Any]") -> Meaning:
    """The meaning that `key` attached."""
    found: Meaning = declared.metadata["meaning"]
    return found


def nearest(name: str, known: Sequence[str]) -> str | None:
    """The known name most like `name`, or None when none is close."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return close[0] if close else None


def walk(cls: type[Any], prefix: str = "") -> Iterator[tuple[str, "Field[Any]", Any]]:
    """Every leaf key below a section class: (dotted path, field, type), in the order of declaration."""
    hints = get_type_hints(cls)
    for declared in fields(cls):
        path = f"{prefix}{declared.name}"
        kind = hints[declared.name]
        if is_dataclass(kind):
            yield from walk(kind, f"{path}.")  # type: ignore[arg-type]
        else:
            yield path, declared, kind


def default_of(declared: "Field[Any]") -> Any:
    """The default of a leaf key."""
    if declared.default is not MISSING:
        return declared.default
    raise TypeError(f"{declared.name} is declared without a default")


def parse(
    cls: type[Section],
    given: Any,
    problems: Problems,
    *,
    path: str = "",
    ignored: Callable[[str], bool] = lambda _: False,
    elsewhere: Mapping[str, str] = MappingProxyType({}),
) -> Section:
    """Build a section from a mapping; problems are collected, and defaults replace what is wrong.

    `ignored` says whether the key at a dotted path is accepted although it means nothing here.
    `elsewhere`: other programs' names for keys of this one -> the dotted key.
    """
    if given is None:
        given = {}
    if not isinstance(given, Mapping):
        problems.add(path, f"expected keys below this section, got {_written(given)}")
        given = {}
    hints = get_type_hints(cls)
    declared = {item.name: item for item in fields(cls)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for name, value in given.items():
        here = f"{path}.{name}" if path else str(name)
        if name in declared:
            kind = hints[name]
            if is_dataclass(kind):
                values[name] = parse(kind, value, problems, path=here, ignored=ignored, elsewhere=elsewhere)  # type: ignore[arg-type]
            else:
                values.update(_leaf(name, declared[name], kind, value, here, problems))
        elif not ignored(here):
            near = nearest(str(name), list(declared))
            where = f"the keys of {path}" if path else "the sections"
            told = f"the nearest known key is {near!r}" if near else f"{where} are {', '.join(declared)}"
            if str(name) in elsewhere:
                told = f"here that is {elsewhere[str(name)]}"
            problems.add(here, f"unknown key; {told}")
    return cls(**values)


def _leaf(
    name: str, declared: "Field[Any]", kind: Any, value: Any, path: str, problems: Problems
) -> dict[str, Any]:
    try:
        converted = _convert(kind, value)
    except TypeError:
        problems.add(path, f"expected {kind_name(kind)}, got {_written(value)}")
        return {}
    meaning = meaning_of(declared)
    if meaning.is_path:
        converted = os.path.expanduser(converted)  # noqa: PTH111 - "" stays ""
    complaint = _range_complaint(meaning, converted)
    if complaint:
        problems.add(path, complaint)
        return {}
    return {name: converted}


def _range_complaint(meaning: Meaning, value: Any) -> str | None:
    if meaning.is_path and value.startswith("~"):
        return f"{value}: no such home folder; a folder of this very name is ./{value}"
    if isinstance(value, tuple) and meaning.choices:
        others = [repr(each) for each in value if each not in meaning.choices]
        if others:
            return f"each must be one of {', '.join(meaning.choices)}; there is {', '.join(others[:5])}"
    if isinstance(value, str) and meaning.choices and value not in meaning.choices:
        number = "a number, or " if meaning.low > -math.inf else ""
        return f"must be {number}one of {', '.join(meaning.choices)}; it is {value!r}"
    numbers = value if isinstance(value, tuple) else (value,)
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            continue
        if not meaning.low <= number <= meaning.high:
            if meaning.high == math.inf:
                return f"must be at least {meaning.low:g}; it is {number}"
            return f"must be between {meaning.low:g} and {meaning.high:g}; it is {number}"
    return None


def _convert(kind: Any, value: Any) -> Any:
    """The value as `kind`; TypeError when it has another type."""
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in get_args(kind):
            return None
        first, *others = [option for option in get_args(kind) if option is not type(None)]
        # A number, or a word instead of it.
        return _convert(others[0] if others and isinstance(value, str) else first, value)
    if origin is tuple:
        (item, *_rest) = get_args(kind)
        values = value if isinstance(value, (list, tuple)) else [value]
        return tuple(_convert(item, each) for each in values)
    if kind is bool:
        return _boolean(value)
    if kind is int:
        if isinstance(value, bool) or not isinstance(value, int) or abs(value) > _LARGEST:
            raise TypeError
        return value
    if kind is float:
        return _number(value)
    if kind is str:
        if not isinstance(value, str):
            raise TypeError
        return value
    raise TypeError


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _number(value: Any) -> float:
    # YAML 1.1 reads 5e-7 (without a point) as a string: users mean the number.
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise TypeError from None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < math.inf:
        raise TypeError
    if isinstance(value, int) and abs(value) > _LARGEST:
        raise TypeError
    return float(value)


def kind_name(kind: Any) -> str:
    """What a key's type is called in messages."""
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        options = [option for option in get_args(kind) if option is not type(None)]
        return " or ".join([*map(kind_name, options), *(["null"] if type(None) in get_args(kind) else [])])
    if origin is tuple:
        return f"a list, each item {kind_name(get_args(kind)[0])}"
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    return names[kind]


def _written(value: Any) -> str:
    names = {bool: "true/false", int: "the whole number", float: "the number", str: "the text"}
    if value is None:
        return "nothing (null)"
    if isinstance(value, Mapping):
        return "keys below it"
    if isinstance(value, (list, tuple)):
        names[type(value)] = "the list"
    try:
        text = reprlib.repr(value)  # bounded: anchors can make a few lines of YAML stand for billions
    except ValueError:  # more digits than Python writes
        text = "of too many digits"
    return f"{names.get(type(value), type(value).__name__)} {text if len(text) <= 80 else text[:77] + '...'}"

"""The options of a system, read from the dataclass or function that its catalogue row names.

Name, type and default come from the signature, the help text from the docstring's `Attributes:` or `Args:` (or from the field's
`metadata={"help": ...}`), and the range from the help text: `in (0, 1]`, `>= 1`. Each option is thus described in one place.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lowdim.errors import UnknownNameError, nearest, shown

__all__ = ["Option", "check_options", "described", "options_of", "parse_options"]

#: The default of a required option.
REQUIRED: Any = inspect.Parameter.empty

_ENTRY = re.compile(r"^ {4}(?P<names>\*{0,2}\w+(?:, \w+)*): (?P<text>.*)$")
_NUMBER = r"-?(?:\d+(?:\.\d+)?(?:e-?\d+)?|inf)"
_INTERVAL = re.compile(rf"\bin (?P<left>[\[(])(?P<low>{_NUMBER}), (?P<high>{_NUMBER})(?P<right>[\])])")
_BOUND = re.compile(rf"(?P<relation>>=|>|<=|<) (?P<bound>{_NUMBER})")
_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}


@dataclass(frozen=True)
class Option:
    """One option of a system.

    Attributes:
        name: of the field or parameter.
        type: its annotation.
        default: `REQUIRED` if there is none.
        help: its meaning, in one line.

    Example:
        >>> from lowdim.jobs import options_of
        >>> from lowdim.compress import WeLoreConfig
        >>> option = options_of(WeLoreConfig)["threshold"]
        >>> option.kind, option.range
        ('a number or null', 'in [0, 1]')
    """

    name: str
    type: Any
    default: Any
    help: str

    @property
    def kind(self) -> str:
        """Its type, as readable text."""
        return _kind(self.type)

    @property
    def default_text(self) -> str:
        """Its default, as it is typed."""
        if self.default is REQUIRED:
            return "required"
        return _typed(self.default)

    @property
    def range(self) -> str:
        """The range of a number, from the help text; empty if it has none."""
        found = _INTERVAL.search(self.help) or _BOUND.search(self.help)
        return found[0] if found else ""

    @property
    def what(self) -> str:
        """Type and range: `a number in (0, 1] or null`."""
        first, *others = self.kind.split(" or ", 1) if self.type is not bool else (self.kind,)
        return " or ".join([f"{first} {self.range}" if self.range else first, *others])

    @property
    def bounds(self) -> tuple[float, float, bool, bool]:
        """`(low, high, low is excluded, high is excluded)`."""
        if found := _INTERVAL.search(self.help):
            return float(found["low"]), float(found["high"]), found["left"] == "(", found["right"] == ")"
        if found := _BOUND.search(self.help):
            bound, relation = float(found["bound"]), found["relation"]
            if relation in (">=", ">"):
                return bound, math.inf, relation == ">", False
            return -math.inf, bound, False, relation == "<"
        return -math.inf, math.inf, False, False

    def accepts(self, value: Any) -> bool:
        """Whether type and range allow this value."""
        if not _fits(self.type, value):
            return False
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            return True
        low, high, open_low, open_high = self.bounds
        return (value > low if open_low else value >= low) and (value < high if open_high else value <= high)


def options_of(thing: Any) -> dict[str, Option]:
    """The options of a system by name: fields of a dataclass, parameters of a class, keyword-only parameters of a function.

    Raises:
        TypeError: neither a class nor a function.

    Example:
        >>> from lowdim.diagnose import intruder_dimensions
        >>> from lowdim.jobs import options_of
        >>> [option.name for option in options_of(intruder_dimensions).values()]
        ['k', 'threshold', 'names']
    """
    help_texts = described(thing)
    if dataclasses.is_dataclass(thing):
        hints = typing.get_type_hints(thing)
        return {
            f.name: Option(f.name, hints[f.name], _default(f), f.metadata.get("help") or help_texts.get(f.name, ""))
            for f in dataclasses.fields(thing)
            if f.init
        }
    if not inspect.isclass(thing) and not inspect.isfunction(thing):
        raise TypeError(f"options are read from a class or a function; got {thing!r}")
    hints = typing.get_type_hints(thing.__init__ if inspect.isclass(thing) else thing)
    return {
        p.name: Option(p.name, hints.get(p.name, Any), p.default, help_texts.get(p.name, ""))
        for p in inspect.signature(thing).parameters.values()
        if p.kind is p.KEYWORD_ONLY or inspect.isclass(thing)
    }


def described(thing: Any) -> dict[str, str]:
    """The docstring's entry in `Attributes:` or `Args:` for each name; a class inherits those of its bases."""
    found: dict[str, str] = {}
    for owner in reversed(thing.__mro__) if inspect.isclass(thing) else (thing,):
        found |= _sections(inspect.cleandoc(owner.__doc__ or ""))
    return found


def parse_options(method: str, texts: Iterable[str]) -> dict[str, Any]:
    """`["rank=8", "centered=false"]` as names and values; a value is read as in a recipe (YAML).

    Raises:
        ValueError: no `=`, a name given more than once, or not YAML.

    Example:
        >>> from lowdim.jobs import parse_options
        >>> parse_options("lord", ["rank=8", "centered=false", "exclude=[lm_head]", "param_ratio=5e-1"])
        {'rank': 8, 'centered': False, 'exclude': ['lm_head'], 'param_ratio': 0.5}
    """
    from lowdim.train.safe_yaml import read_yaml

    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name:
            raise ValueError(f"--option must be name=value; got {text!r} (`lowdim list {method}` shows the options)")
        if name in found:
            raise ValueError(f"option {name} of {method} is given more than once")
        try:
            found[name] = read_yaml(value)
        except ValueError as error:
            raise ValueError(f"option {name} of {method}: {shown(value)} is not YAML: {error}") from None
    return found


def check_options(method: str, known: Mapping[str, Option], given: Mapping[str, Any], others: Sequence[str] = ()) -> None:
    """Raise unless every name is one of the method's options and every value is allowed.

    Args:
        others: methods that have an option of an unknown name, for the message.

    Raises:
        UnknownNameError: the method has no such option; the nearest are listed with their ranges.
        ValueError: a value of another type or outside its range.
    """
    for name, value in given.items():
        if name not in known:
            close = "; ".join(f"{n} ({known[n].what})" for n in nearest(name, known))
            owner = f" ({', '.join(others)} has)" if others else ""
            raise UnknownNameError(
                f"{method} has no option {name!r}{owner}; {f'nearest: {close}' if close else 'it has no options'}"
            )
        if not known[name].accepts(value):
            raise ValueError(f"option {name} of {method} must be {known[name].what}; got {value!r}")


def _typed(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_typed, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else REQUIRED


def _sections(doc: str) -> dict[str, str]:
    """Entries of the `Args:` and `Attributes:` sections, each as one line."""
    found: dict[str, str] = {}
    names: list[str] = []
    inside = False
    for line in doc.splitlines():
        if line and not line.startswith(" "):
            inside, names = line in ("Args:", "Attributes:"), []
        elif inside and (entry := _ENTRY.match(line)):
            names = entry["names"].replace("*", "").split(", ")
            found |= dict.fromkeys(names, entry["text"].strip())
        elif inside and line.startswith(" " * 8):
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
    return found


def _kind(hint: Any) -> str:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_kind(part) for part in parts))
    if origin is typing.Literal:
        return " or ".join(map(str, parts))
    if origin is not None and _is(origin, Mapping):
        return "a mapping"
    if origin is not None and _is(origin, Iterable):
        return "a list"
    return _WORDS.get(hint, "a value")


def _fits(hint: Any, value: Any) -> bool:
    """Whether a value read from text is of the annotated type; other types are left to the system itself."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(part, value) for part in parts)
    if origin is typing.Literal:
        return value in parts
    if origin is not None and _is(origin, Mapping):
        return isinstance(value, Mapping)
    if origin is not None and _is(origin, Iterable):
        return isinstance(value, (list, tuple)) and all(_fits(parts[0], part) for part in value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint) if hint in _WORDS else True


def _is(origin: Any, base: type | Callable[..., Any]) -> bool:
    return inspect.isclass(origin) and issubclass(origin, base)  # type: ignore[arg-type]

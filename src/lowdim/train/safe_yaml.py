"""YAML as plain values, bounded: a file of a few hundred bytes cannot stand for millions of values."""

from __future__ import annotations

import re
from typing import Any

import yaml
from yaml.constructor import ConstructorError

__all__ = ["Lines", "read_yaml", "read_yaml_lines"]

#: The line of each value, by its keys and indices from the top: `("steps", 0, "lr")`.
Lines = dict[tuple[str | int, ...], int]

_MOST_CHARACTERS = 1_000_000
_MOST_VALUES = 100_000
_DEPTH = 50


class _Loader(yaml.SafeLoader):
    """YAML 1.2 where it matters here: `1e-3` is a number (1.1 requires `1.0e-3`), and duplicate keys are errors."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise ConstructorError(None, None, f"duplicate key {key.value[:80]!r}", key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_yaml(text: str) -> Any:
    """YAML as values; `1e-3` is a number, a key that is given twice an error.

    Aliases are allowed as long as the values that they stand for stay below 100,000 in all.

    Raises:
        ValueError: not YAML; a value that its type cannot have (the date 2001-99-99); nested deeper than 50 levels; aliases
            that contain themselves or grow without bound.

    Example:
        >>> from lowdim.train.safe_yaml import read_yaml
        >>> read_yaml("{lr: 1e-3, target_modules: [q_proj, v_proj]}")
        {'lr': 0.001, 'target_modules': ['q_proj', 'v_proj']}
    """
    return _read(text)[0]


def read_yaml_lines(text: str) -> tuple[Any, Lines]:
    """`read_yaml`, and the line in which each key (or entry of a list) stands, from 1.

    Raises:
        ValueError: as for `read_yaml`.

    Example:
        >>> from lowdim.train.safe_yaml import read_yaml_lines
        >>> read_yaml_lines("{model: small, steps: [{lr: 1e-3}]}")[1]
        {('model',): 1, ('steps',): 1, ('steps', 0): 1, ('steps', 0, 'lr'): 1}
    """
    value, node = _read(text)
    lines: Lines = {}
    if node is not None:
        _collect(node, (), lines)
    return value, lines


def _collect(node: Any, place: tuple[str | int, ...], lines: Lines) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                lines[(*place, key.value)] = key.start_mark.line + 1
                _collect(value, (*place, key.value), lines)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            lines[(*place, i)] = value.start_mark.line + 1
            _collect(value, (*place, i), lines)


def _read(text: str) -> tuple[Any, Any]:
    """The value, and its node."""
    if len(text) > _MOST_CHARACTERS:
        raise ValueError(f"it has {len(text):,} characters; at most {_MOST_CHARACTERS:,} are read")
    try:
        loader = _Loader(text)  # a SafeLoader
        node = loader.get_single_node()
        if node is None:
            return None, None
        _check_size(node)
        return loader.construct_document(node), node
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except (yaml.YAMLError, ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError) as error:
        # PyYAML's constructors raise what Python raises for a date 2001-99-99, `!!bool maybe`, `!!int ''`.
        raise ValueError(" ".join(str(error).split())[:400] or type(error).__name__) from None


def _check_size(root: yaml.Node) -> None:
    """Raise ValueError where the values below `root`, every alias counted as often as it is used, are too many."""
    sizes: dict[int, int] = {}

    def size(node: Any, depth: int) -> int:
        if depth > _DEPTH:
            raise ValueError(f"it is nested deeper than {_DEPTH} levels")
        if id(node) not in sizes:
            sizes[id(node)] = _MOST_VALUES + 1  # found again below itself: it contains itself
            inner = [] if isinstance(node, yaml.ScalarNode) else node.value
            if isinstance(node, yaml.MappingNode):
                inner = [part for pair in inner for part in pair]
            sizes[id(node)] = 1 + sum(size(part, depth + 1) for part in inner)
        if sizes[id(node)] > _MOST_VALUES:
            raise ValueError(f"it stands for more than {_MOST_VALUES:,} values, or an alias contains itself")
        return sizes[id(node)]

    size(root, 0)

"""`lowdim compare`."""

from __future__ import annotations

import re
import sys
from typing import Any

from rich.console import Console

from lowdim.architectures import SHAPES

__all__ = ["compare", "parse_seconds"]

#: Without --data: a sample of sentence polarity and a short run, to end within five minutes on two cores.
_DEMO = {"seeds": 3, "trials": 2, "steps": 20, "max_length": 40, "time_limit": 255.0}
_USUAL = {"seeds": 3, "trials": 3, "steps": 100, "max_length": 128, "time_limit": None}
_UNITS = {"s": 1, "m": 60, "h": 3600, "": 1}


def compare(options: dict[str, Any], out: str, resume: bool) -> None:
    """Fill in what was left open, and run."""
    given = dict(options)
    if given["time_limit"] is not None:
        given["time_limit"] = parse_seconds(given["time_limit"])
    if given["budget"] is not None:
        from lowdim.units import parse_bytes

        given["budget"] = parse_bytes(given["budget"])
    from lowdim.compare import CompareSettings
    from lowdim.compare import compare as run
    from lowdim.compare.runner import quote

    demo = given["data"] is None and given["task"] == "classify"
    if given["task"] == "pretrain" and given["tokenizer"] is None and given["model"] in SHAPES:
        given["tokenizer"] = "bytes"
    if given["data"] is None:
        given["data"] = ["lowdim:sentence-polarity" if demo else "lowdim:shakespeare"]
    for key, value in (_DEMO if demo else _USUAL).items():
        if given[key] is None:
            given[key] = value
    given["data"] = tuple(given["data"])
    given["methods"] = tuple(given["methods"].split(",")) if given["methods"] else ()
    run(CompareSettings(**given), out, resume=resume, console=Console(), command=quote(sys.argv[1:]))


def parse_seconds(text: str) -> float:
    """`90`, `90s`, `10m` or `2h` in seconds.

    Raises:
        ValueError: anything else.

    Example:
        >>> from lowdim.cli.comparing import parse_seconds
        >>> parse_seconds("10m")
        600.0
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smh]?)\s*", text)
    if not match or float(match[1]) <= 0:
        raise ValueError(f"--time-limit must be a number of s, m or h above zero, such as 90s or 10m; got {text!r}")
    return float(match[1]) * _UNITS[match[2]]

"""The document around the sections: head, policy, styles, scripts and the data that the scripts draw."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from lowdim.report import sections
from lowdim.report.findings import mapping
from lowdim.report.record import Candidate
from lowdim.report.text import date, esc, plain

__all__ = ["chart", "costs_of", "document", "footer", "method_view", "plot", "record_document"]

_SCRIPTS = (
    "charts.js",
    "scatter.js",
    "tree.js",
    "rates.js",
    "curves.js",
    "page.js",
)  # in this order; each uses only those before it
_REFUSED = "base-uri 'none'; form-action 'none'"


def chart(name: str, title: str, hint: str, kind: str, after: str) -> str:
    """A section with a figure that the script fills; its numbers are also in a table."""
    return sections.section(name, title, plot(kind) + after, hint)


def plot(kind: str) -> str:
    """The place in which the script draws a figure."""
    return f'<div class="chart" data-chart="{kind}"><noscript><p>This chart needs JavaScript.</p></noscript></div>'


def costs_of(candidate: Candidate) -> dict[str, float | None]:
    """The costs of a method, by the names of the chart's axes."""
    return {
        "memory": candidate.peak_bytes,
        "time": candidate.seconds_per_step,
        "parameters": candidate.trained_parameters,
        "file": candidate.file_bytes,
    }


def method_view(candidate: Candidate, shape: str, chosen: bool, marked_as: str = "") -> dict[str, Any]:
    """A method as the scripts read it."""
    return {
        "name": candidate.name,
        "label": candidate.label,
        "family": candidate.family,
        "shape": shape,
        "colour": candidate.colour,
        "dash": candidate.dash,
        "baseline": candidate.baseline,
        "chosen": chosen,
        "near": candidate.within_noise,
        "trivial": candidate.trivial,
        "may": candidate.may_be_best,
        "marked": marked_as,
        "behind": candidate.behind,
        "half": candidate.half_width,
        "mean": candidate.mean,
        "interval": candidate.interval,
        "seeds": len(candidate.scores),
        "costs": costs_of(candidate),
        "forecast": candidate.measured_peak_bytes is None,
        "lr": candidate.lr,
        "size": candidate.size,
        "edge": candidate.at_edge,
        "trials": [(trial.lr, trial.score, trial.size) for trial in candidate.trials],
        "curves": [{"step": line.step, "loss": line.loss} for line in candidate.curves],
    }


def footer(version: str, command: str) -> str:
    """The version that made the page, and the command."""
    made = f"<p>Made by lowdim{' ' + esc(version) if version else ''} from the record alone.</p>"
    return made + (f"<details><summary>Command</summary><pre><code>{esc(command)}</code></pre></details>" if command else "")


def record_document(
    record: Mapping[str, Any], title: str, by: str, body: str, view: dict[str, Any], *, version: Any = None
) -> str:
    """`document` of a record that says when, by which command and by which version it was made.

    Args:
        by: the command's name, above the title.
        version: None reads it from the record's environment.
    """
    made = " · ".join(part for part in (by, date(record.get("created"))) if part)
    version = version or mapping(record.get("environment")).get("lowdim")
    return document(title, made, body, footer(plain(version, 40), plain(record.get("command"))), view)


def document(title: str, made: str, body: str, bottom: str, view: dict[str, Any]) -> str:
    """The whole document; `body` and `bottom` are HTML, the rest is text."""
    style, script = _asset("page.css"), "".join(map(_asset, _SCRIPTS))
    # Every "<" is escaped, so no string can close the element.
    data = json.dumps(_integral(view), allow_nan=False, separators=(",", ":"))
    data = data.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
    symbols = "".join(
        f'<symbol id="m-{name}" viewBox="-8 -8 16 16"><path d="{d}"/></symbol>' for name, d in sections.SHAPES.items()
    )
    values = {
        "policy": f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; {_REFUSED}",
        "title": esc(title),
        "made": esc(made),
        "style": style,
        "symbols": symbols,
        "body": body,
        "footer": bottom,
        "data": data,
        "script": script,
    }
    # One pass: text inside a value that looks like a slot stays text.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], _asset("page.html"))


def _integral(value: Any) -> Any:
    """Whole floats as ints, which is shorter; tuples as lists."""
    if isinstance(value, float):
        return int(value) if value.is_integer() and abs(value) < 2**53 else value
    if isinstance(value, dict):
        return {key: _integral(item) for key, item in value.items()}
    return [_integral(item) for item in value] if isinstance(value, (list, tuple)) else value


def _asset(name: str) -> str:
    return files("lowdim.report").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

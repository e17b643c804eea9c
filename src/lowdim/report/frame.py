"""The document around the sections: head, policy, styles, scripts and the data that the scripts draw."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from importlib.resources import files
from typing import Any

from lowdim.report import sections
from lowdim.report.record import Candidate
from lowdim.report.text import esc

__all__ = ["answer", "chart", "costs_of", "document", "footer", "method_view", "trust"]

_SCRIPTS = ("charts.js", "scatter.js", "curves.js", "page.js")  # in this order; each uses only those before it
_REFUSED = "base-uri 'none'; form-action 'none'"


def answer(verdict: str, rest: str) -> str:
    """The first thing on the page: the verdict, and the sentences that carry its numbers."""
    # A number stays on one line with its unit, an interval with its ends.
    whole = re.sub(
        r"(\d) (?=[KMGT]?i?B\b|ms\b|s\b)|(?<=\d,) (?=−?[\d.]+\])|(?<=\d) (?=\[)", lambda m: f"{m[1] or ''}\u00a0", rest
    )
    return f'<p class="answer"><strong>{esc(verdict)}.</strong> {esc(whole)}</p>'


def trust(lines: list[str]) -> str:
    """The caveats."""
    if not lines:
        return ""
    entries = "".join(f"<li>{esc(line)}</li>" for line in lines)
    return f'<aside aria-labelledby="trust-h"><h2 id="trust-h">How far to trust this</h2><ul>{entries}</ul></aside>'


def chart(name: str, title: str, hint: str, kind: str, after: str) -> str:
    """A figure that the script fills; its numbers are also in a table."""
    body = f'<div class="chart" data-chart="{kind}"><noscript><p>This chart needs JavaScript.</p></noscript></div>{after}'
    return sections.section(name, title, body, hint)


def costs_of(candidate: Candidate) -> dict[str, float | None]:
    """The costs of a method, by the names of the chart's axes."""
    return {
        "memory": candidate.peak_bytes,
        "time": candidate.seconds_per_step,
        "parameters": candidate.trained_parameters,
        "file": candidate.file_bytes,
    }


def method_view(candidate: Candidate, shape: str, chosen: bool) -> dict[str, Any]:
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
        "mean": candidate.mean,
        "interval": candidate.interval,
        "seeds": len(candidate.scores),
        "costs": costs_of(candidate),
        "forecast": candidate.measured_peak_bytes is None,
        "lr": candidate.lr,
        "edge": candidate.at_edge,
        "trials": [(trial.lr, trial.score) for trial in candidate.trials],
        "curves": [{"step": line.step, "loss": line.loss} for line in candidate.curves],
    }


def footer(version: str, command: str) -> str:
    """The version that made the page, and the command."""
    made = f"<p>Made by lowdim{' ' + esc(version) if version else ''} from the record alone.</p>"
    return made + (f"<details><summary>Command</summary><pre><code>{esc(command)}</code></pre></details>" if command else "")


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

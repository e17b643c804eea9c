"""The HTML page of a single run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowdim.outputs import write_page
from lowdim.records import metric_title
from lowdim.report import sections
from lowdim.report.frame import answer, chart, document, footer, method_view, trust
from lowdim.report.record import Candidate, curve, items, mapping, thin
from lowdim.report.text import count, date, duration, esc, number, plain, size

__all__ = ["render_run", "write_run"]

# Keys shown elsewhere on the page, or useless to a reader (a fingerprint, the result of each test example).
_PLACED = {"schema", "title", "method", "label", "config", "versions", "hardware", "environment", "losses", "loss_steps"}
_PLACED |= {"notes", "command", "created", "failure", "hits", "fingerprint", "files", "evaluations", "subspaces", "spikes"}
#: The numbers about subspaces in a run's log, as (key, heading), and the number of steps shown.
_SEEN = (
    ("true_grad_norm", "Gradient norm"),
    ("projected_norm", "Projected norm"),
    ("captured", "Share captured"),
    ("overlap", "Overlap with the last subspaces"),
)
_SHOWN = 12
_SCORES = (("score", ""), ("test", "test "), ("validation", "validation "))


def render_run(run: Mapping[str, Any]) -> str:
    """The page of a single run.

    Args:
        run: the record in `run.json`: `method`, `label`, `config`, `seed`, `versions`, `hardware` or `environment`,
            `losses` (numbers with their steps in `loss_steps`, or rows with `step` and `loss`), `score` or `test` and
            `validation`, `failure`, and any other entries; as tolerant as `render`.

    Returns:
        One HTML document.

    Example:
        >>> "Training loss" in render_run({"method": "lora", "losses": [0.7, 0.6, 0.5]})
        True
    """
    run = mapping(run)
    method = mapping(run.get("method")) or {"name": run.get("method")}
    name = plain(run.get("label") or method.get("label") or method.get("name"), 120) or "Run"
    metric = plain(mapping(run.get("metric")).get("name") or run.get("metric"), 60) if run.get("metric") else "score"
    metric = metric_title(metric)
    scores = [(f"{kind}{metric}", value) for key, kind in _SCORES if (value := number(run.get(key))) is not None]
    losses = run.get("losses")
    steps = items(run.get("loss_steps"))
    line = curve({"loss": losses, "step": steps} if steps else losses, run.get("seed"))
    line = thin(line, 2000) if line else None
    known = [v for v in line.loss if v is not None] if line else []
    failure = plain(run.get("failure"), 4000)
    seed = f", seed {plain(run.get('seed'), 40)}" if run.get("seed") is not None else ""
    warnings = [f"The run failed: {failure}"] if failure else []
    warnings += ["The training loss was not finite at some steps."] if line and line.lost else []
    spikes = [f"{number(step):.0f}" for step in items(run.get("spikes"))[:50] if number(step) is not None]
    warnings += [f"The training loss jumped at step {', '.join(spikes)}."] if spikes else []
    warnings += [plain(note) for note in items(run.get("notes"))[:200] if note is not None]
    config = run.get("config")
    circumstances = (
        sections.details("Versions", _described(run.get("versions")), opened=True)
        + sections.details("Hardware", _described(run.get("hardware")), opened=True)
        + sections.details("Machine and versions", _described(run.get("environment")), opened=True)
        + sections.details("Everything else in the record", sections.pairs(run, skip=_PLACED))
    )
    body = "".join(
        (
            answer(f"{name}{seed}{' failed' if failure else ''}", _sentence(scores, known)),
            sections.tile_list(_tiles(run, scores, known), "Numbers of this run"),
            trust(warnings),
            chart("losses", "Training loss", "", "curves", "") if known else "",
            sections.section("scores", "Scores during training", _scores(run)),
            sections.section("subspaces", "Subspaces", _subspaces(run)),
            sections.section("config", "Configuration", _described(config)),
            sections.section("circumstances", "Circumstances", circumstances),
        )
    )
    only = Candidate(name=name, label=name, within_noise=None, curves=[line] if line else [])
    view = {"kind": "run", "metric": {"name": metric}, "costs": [], "methods": [method_view(only, "circle", False)]}
    made = " · ".join(part for part in ("lowdim run", date(run.get("created"))) if part)
    version = mapping(run.get("versions")).get("lowdim") or mapping(run.get("environment")).get("lowdim")
    bottom = footer(plain(version, 40), plain(run.get("command")))
    return document(plain(run.get("title"), 300) or name, made, body, bottom, view)


def write_run(run: Mapping[str, Any], path: str | Path) -> Path:
    """Write the run's page to `path`; an old file is replaced only once the new one is complete.

    Raises:
        OSError: no space or no permission; an old file is unchanged.
    """
    return write_page(path, render_run(run))


def _sentence(scores: list[tuple[str, float]], losses: list[float]) -> str:
    text = ", ".join(f"{name} {value:.4g}" for name, value in scores) or "no score was recorded"
    if len(losses) > 1:
        text += f"; the training loss went from {losses[0]:.3g} to {losses[-1]:.3g}"
    return f"{text[:1].upper()}{text[1:]}."


def _tiles(run: Mapping[str, Any], scores: list[tuple[str, float]], losses: list[float]) -> list[tuple[str, str, str]]:
    return [
        *((name, f"{value:.4g}", "") for name, value in scores),
        ("Last loss", f"{losses[-1]:.4g}" if losses else "", f"from {losses[0]:.4g}" if len(losses) > 1 else ""),
        ("Peak memory", size(number(run.get("measured_peak_bytes"))), ""),
        ("Time per step", duration(number(run.get("seconds_per_step"))), ""),
        ("Trained parameters", count(number(run.get("trained_parameters"))), ""),
        ("Saved file", size(number(run.get("file_bytes"))), ""),
    ]


def _scores(run: Mapping[str, Any]) -> str:
    rows = [items(row) for row in items(run.get("evaluations"))]
    known = [(number(r[0]), number(r[1])) for r in rows if len(r) == 2]
    cells = [[f"{step:.0f}", f"{loss:.4f}"] for step, loss in known if step is not None and loss is not None]
    return _table(["Step", "Validation loss, nats per token"], _some(cells))


def _subspaces(run: Mapping[str, Any]) -> str:
    rows = [mapping(row) for row in items(run.get("subspaces"))]
    keys = [(key, head) for key, head in _SEEN if any(number(row.get(key)) is not None for row in rows)]
    cells = []
    for row in _some(rows):
        values = [number(row.get(key)) for key, _ in keys]
        cells.append([plain(row.get("step"), 20), *("" if v is None else f"{v:.4g}" for v in values)])
    return _table(["Step", *(head for _, head in keys)], cells) if keys else ""


def _some(rows: list[Any]) -> list[Any]:
    """A limited number of rows, evenly spaced, including the first and the last."""
    if len(rows) <= _SHOWN:
        return rows
    return [rows[round(i * (len(rows) - 1) / (_SHOWN - 1))] for i in range(_SHOWN)]


def _table(heads: list[str], rows: list[list[str]]) -> str:
    if not rows:
        return ""
    head = "".join(f'<th scope="col">{esc(h)}</th>' for h in heads)
    body = "".join("<tr>" + "".join(f"<td>{esc(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Numbers by step">'
        f'<table class="numbers"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _described(value: Any) -> str:
    return sections.pairs(value) if isinstance(value, Mapping) else f"<p>{esc(value)}</p>" if plain(value) else ""

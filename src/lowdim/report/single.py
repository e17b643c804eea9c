"""The HTML page of a single run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowdim.outputs import write_page
from lowdim.records import LossCurve, SampleRecord, metric_title
from lowdim.report import cuts, evidence, findings, sections, watched
from lowdim.report.findings import items, mapping
from lowdim.report.frame import chart, method_view, record_document
from lowdim.report.opening import verdict
from lowdim.report.reading import curve, thin
from lowdim.report.record import Candidate
from lowdim.report.replacement import replacement_sections, replacement_sentence
from lowdim.report.text import count, duration, esc, number, plain, size

__all__ = ["render_run", "write_run"]

# Keys shown elsewhere on the page, or useless to a reader (a fingerprint, the result of each test example).
_PLACED = {"schema", "title", "method", "label", "config", "versions", "hardware", "environment", "losses", "loss_steps"}
_PLACED |= {"notes", "command", "created", "failure", "hits", "fingerprint", "files", "evaluations", "subspaces", "spikes"}
_PLACED |= {"before", "before_test", "validation", "test", "by_class", "samples", "kept", "data", "values", "validation_values"}
_PLACED |= {"replacement", "by_size", "watch"}
_SCORES = (("score", "", ""), ("test", "test ", "before_test"), ("validation", "validation ", "before"))


def render_run(run: Mapping[str, Any]) -> str:
    """The page of a single run.

    Args:
        run: the record in `run.json`: `method`, `label`, `config`, `seed`, `versions`, `hardware` or `environment`,
            `losses` (numbers with their steps in `loss_steps`, or rows with `step` and `loss`), `score` or `test` and
            `validation` (`before_test` and `before` are theirs before training), `by_class`, `samples`, `kept`, `data`,
            `failure`, and any other entries; as tolerant as `render`.

    Returns:
        One HTML document.

    Example:
        >>> "Training loss" in render_run({"method": "lora", "losses": [0.7, 0.6, 0.5]})
        True
    """
    run = mapping(run)
    method = mapping(run.get("method")) or {"name": run.get("method")}
    name = plain(run.get("label") or method.get("label") or method.get("name"), 120) or "Run"
    line = _losses(run)
    known = [v for v in line.loss if v is not None] if line else []
    config, data = run.get("config"), mapping(run.get("data"))
    section, details = sections.section, sections.details
    circumstances = (
        details("Versions", _described(run.get("versions")), opened=True)
        + details("Hardware", _described(run.get("hardware")), opened=True)
        + details("Machine and versions", _described(run.get("environment")), opened=True)
        + details("Everything else in the record", sections.pairs(run, skip=_PLACED))
    )
    body = "".join(
        (
            _opening(run, name, line, known),
            section("samples", "What the model wrote", _samples(run), "Prompts of the test part, before and after training."),
            section("classes", "By class", evidence.class_table(findings.classes(run.get("by_class"))), "On the test part."),
            section("smaller-sizes", "At smaller sizes", cuts.run_table(run), cuts.RUN_HINT),
            _replacement(run),
            chart("losses", "Training loss", "", "curves", "") if known else "",
            section("scores", "Scores during training", watched.scores(run)),
            section("subspaces", "Subspaces", watched.subspaces(run)),
            section("layers", "Layers during training", watched.layers(run), _watched_hint(run)),
            section("the-data", "Data", evidence.data_section(data)),
            section("config", "Configuration", _described(config)),
            section("circumstances", "Circumstances", circumstances),
        )
    )
    only = Candidate(name=name, label=name, within_noise=None, curves=[line] if line else [])
    view = {"kind": "run", "metric": {"name": _metric(run)}, "costs": [], "methods": [method_view(only, "circle", False)]}
    version = mapping(run.get("versions")).get("lowdim") or mapping(run.get("environment")).get("lowdim") or run.get("lowdim")
    return record_document(run, plain(run.get("title"), 300) or name, "lowdim run", body, view, version=version)


def write_run(run: Mapping[str, Any], path: str | Path) -> Path:
    """Write the run's page to `path`; an old file is replaced only once the new one is complete.

    Raises:
        OSError: no space or no permission; an old file is unchanged.
    """
    return write_page(path, render_run(run))


def _metric(run: Mapping[str, Any]) -> str:
    named = plain(mapping(run.get("metric")).get("name") or run.get("metric"), 60) if run.get("metric") else "score"
    return metric_title(named)


def _losses(run: Mapping[str, Any]) -> LossCurve | None:
    losses, steps = run.get("losses"), items(run.get("loss_steps"))
    line = curve({"loss": losses, "step": steps} if steps else losses, run.get("seed"))
    return thin(line, 2000) if line else None


def _opening(run: Mapping[str, Any], name: str, line: LossCurve | None, known: list[float]) -> str:
    """The scores in a sentence, what speaks against them, and the figures of the run."""
    failure = plain(run.get("failure"), 4000)
    seed = f", seed {plain(run.get('seed'), 40)}" if run.get("seed") is not None else ""
    doubts = [f"The run failed: {failure}"] if failure else []
    doubts += ["The training loss was not finite at some steps."] if line and line.lost else []
    spikes = [f"{number(step):.0f}" for step in items(run.get("spikes"))[:50] if number(step) is not None]
    doubts += [f"The training loss jumped at step {', '.join(spikes)}."] if spikes else []
    doubts += [plain(note) for note in items(run.get("notes"))[:200] if note is not None]
    scores = _scores(run)
    said = f"{name}{seed}{' failed' if failure else ''}."
    if scores and not failure:
        title, after, before = scores[0]
        said = f"{title[:1].upper()}{title[1:]} {after:.4g}{'' if before is None else f', {before:.4g} before training'}."
    words = verdict(said, [_sentence(name, seed, run, known)], "", doubts) + _before_after(run)
    return f'<div class="opening"><div class="verdict">{words}</div><div class="pick">{_tiles(run, known)}</div></div>'


def _scores(run: Mapping[str, Any]) -> list[tuple[str, float, float | None]]:
    """Name, score, and score before training, of each part that has one."""
    found = [(f"{kind}{_metric(run)}", number(run.get(key)), number(run.get(before))) for key, kind, before in _SCORES]
    return [(name, after, before) for name, after, before in found if after is not None]


def _sentence(name: str, seed: str, run: Mapping[str, Any], losses: list[float]) -> str:
    text = ", ".join(f"{part} {value:.4g}" for part, value, _ in _scores(run)) or "no score was recorded"
    if len(losses) > 1:
        text += f"; the training loss went from {losses[0]:.3g} to {losses[-1]:.3g}"
    return f"{name}{seed}: {text}."


def _tiles(run: Mapping[str, Any], losses: list[float]) -> str:
    tiles = [
        ("Peak memory", size(number(run.get("measured_peak_bytes"))), ""),
        ("Time per step", duration(number(run.get("seconds_per_step"))), ""),
        ("Trained parameters", count(number(run.get("trained_parameters"))), ""),
        ("Saved file", size(number(run.get("file_bytes"))), ""),
        ("Last loss", f"{losses[-1]:.4g}" if losses else "", f"from {losses[0]:.4g}" if len(losses) > 1 else ""),
    ]
    return sections.tile_list(tiles, "Numbers of this run")


def _before_after(run: Mapping[str, Any]) -> str:
    """The scores before and after on both parts, a constant answer's, and the loss on the text that must not be forgotten."""
    rows = [(f"{name[:1].upper()}{name[1:]}", before, after) for name, after, before in _scores(run)]
    kept = findings.kept(run.get("kept"))
    rows += [("Loss on the kept text", kept[0], kept[1])] if kept else []
    cells = [(name, _short(before), _short(after), _change(before, after)) for name, before, after in rows]
    constant = mapping(mapping(run.get("data")).get("baseline"))
    least, what = number(mapping(constant.get("scores")).get(plain(run.get("metric"), 60))), plain(constant.get("what"), 200)
    if least is not None and what:
        cells.append((f"{what[:1].upper()}{what[1:]}", "", _short(least), ""))
    return sections.numbers(("", "Before", "After", "Change"), cells, "Scores before and after training") if cells else ""


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:#.4g}".rstrip(".")


def _change(before: float | None, after: float) -> str:
    return "" if before is None else f"{after - before:+.3g}".replace("-", "−")


def _samples(run: Mapping[str, Any]) -> str:
    found = []
    for row in map(mapping, items(run.get("samples"))[:20]):
        answers = {key: plain(row[key], 4000) for key in ("before", "after") if row.get(key) is not None}
        if answers:
            found.append(
                SampleRecord(prompt=plain(row.get("prompt"), 4000), expected=plain(row.get("expected"), 4000), answers=answers)
            )
    return evidence.sample_list(found, {"before": "Before training", "after": "After training"}, ("before", "after"))


def _replacement(run: Mapping[str, Any]) -> str:
    """What the new vectors find in the index of the model that is replaced."""
    record = mapping(run.get("replacement"))
    if not record:
        return ""
    said = f"<p>{esc(replacement_sentence(record))} The model that is replaced: {esc(plain(record.get('old'), 200))}.</p>"
    return sections.section("old-index", "May the old index stay?", said) + replacement_sections(record)


def _watched_hint(run: Mapping[str, Any]) -> str:
    """What the charts of the layers mean."""
    watch = mapping(run.get("watch"))
    k = plain(watch.get("k"), 20) or "k"
    return (
        f"A smaller alpha is a heavier tail, an intruder is one of the {k} strongest directions that the start did not have, "
        f"and overlap is 1 while the {k} strongest directions are those of the start; points are means over the layers, "
        "bars reach from the smallest to the largest."
    )


def _described(value: Any) -> str:
    return sections.pairs(value) if isinstance(value, Mapping) else f"<p>{esc(value)}</p>" if plain(value) else ""

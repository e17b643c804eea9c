"""The sentences of a report: the result, and how far to trust it. All are computed from the record alone."""

from __future__ import annotations

import math

from lowdim.report.record import Candidate, Comparison
from lowdim.report.text import count, number, plain, plural, ratio, series, size

__all__ = ["caveats", "headline", "spoken", "subtitle"]

_TASKS = {
    "classify": "Classification",
    "regress": "Regression",
    "instruct": "Instruction tuning",
    "causal-lm": "Language modelling",
    "pretrain": "Pretraining",
    "image": "Image classification",
    "tokens": "Token classification",
    "embed": "Sentence embeddings",
}
_FEW_SEEDS = 5  # below this an interval has too few values to rely on


def spoken(comparison: Comparison) -> tuple[str, list[str]]:
    """The verdict in one sentence, and the sentences that follow."""
    found = comparison.judgement
    if found:
        return found.headline, [line for line in (*found.reasons, found.needed) if line]
    said, rest = headline(comparison)
    return f"{said}.", [rest]


def headline(comparison: Comparison) -> tuple[str, str]:
    """The answer in a few words, and the sentences that carry its numbers."""
    best = comparison.best
    if best is None:
        return _nothing(comparison)
    chosen = comparison.chosen or best
    others = [c for c in comparison.ranked if c is not chosen]
    if (trivial := comparison.unbeaten) is not None:
        return _unbeaten(comparison, trivial, best)
    if not others:
        tried = len(comparison.compared)
        alone = f", the only one of {tried} candidates with a score" if tried > 1 else ""
        return chosen.label, _sentence(f"{_score(comparison, chosen)}{_peak(chosen)}{alone}.")
    level = "highest" if comparison.higher else "lowest"
    near = [c for c in comparison.ranked if c.within_noise and c is not best]
    if len(near) == len(others):
        return _undecided(comparison, chosen, best)
    if chosen is not best:
        verdict = f"{chosen.label} is the pick"
        relation = "within noise of" if chosen.within_noise else "behind" if chosen.mean is not None else "chosen over"
        rest = f"{_score(comparison, chosen)}{_peak(chosen)}, {relation} the {level} score ({best.label}, "
        rest += f"{comparison.score(best.mean)}){_cost(chosen, best)}."
        return verdict, _sentence(rest)
    # With one seed, or without information on noise, the best score decides nothing.
    settled = not near and all(len(c.scores) > 1 for c in (chosen, *others)) and any(c.within_noise is False for c in others)
    verdict = f"{chosen.label} {'wins' if settled else 'scores best'}"
    rest = f"{_score(comparison, chosen)}{_peak(chosen)}, the {level} of {len(comparison.ranked)} methods."
    return verdict, _sentence(rest) + _near(chosen, near) + _against(comparison, chosen)


def _unbeaten(comparison: Comparison, trivial: Candidate, best: Candidate) -> tuple[str, str]:
    """Where the best is not clearly better than what was never trained."""
    what = (trivial.reason or "").strip() or trivial.label
    rest = f"{what} gives {comparison.metric} {comparison.score(trivial.mean)}; "
    rest += f"the best method, {best.label}, has {_score(comparison, best)}."
    tell = " Compare by f1 (macro) or mcc, which give a constant answer no credit." if comparison.metric == "accuracy" else ""
    return f"No method is clearly better than {trivial.label.lower()}", _sentence(rest) + tell


def _undecided(comparison: Comparison, chosen: Candidate, best: Candidate) -> tuple[str, str]:
    """Where all methods are within noise of the best."""
    rest = f"all {len(comparison.ranked)} methods are within noise of {best.label}, {_score(comparison, best)}."
    pick = f" {chosen.label} is the pick{_peak(chosen)}"
    if chosen is not best:
        pick += f", {comparison.metric} {comparison.score(chosen.mean)}{_cost(chosen, best)}"
    return "No difference was shown", _sentence(rest) + pick + "."


def caveats(comparison: Comparison) -> list[str]:
    """Caveats that a careful reader should know before acting on the headline."""
    ranked = comparison.ranked
    ran = [c for c in comparison.finished if not c.trivial]
    judged = comparison.judgement is not None  # its reasons say what is noise
    lines = [] if judged else [*_seeds(comparison), *_noise(comparison), *_test_set(comparison)]
    edge = [c.label for c in ranked if c.at_edge]
    if edge and not judged:
        word = "its best learning rate was" if len(edge) == 1 else "the best learning rate was"
        lines.append(f"{_some(edge)}: {word} the smallest or largest one tried. A wider search could change the ranking.")
    lines += [f"{c.label}: {c.reason.strip().splitlines()[0]}" for c in ran if c.reason and c.reason.strip()]
    lost = [c.label for c in ran if any(line.lost for line in c.curves)]
    if lost:
        lines.append(f"{_some(lost)}: the training loss was not finite at some steps.")
    over = [c.label for c in ran if _over(c, comparison.budget)]
    if over:
        lines.append(f"{_some(over)}: measured peak memory is above the budget of {size(comparison.budget)}.")
    lines += _forecasts(comparison)
    states = {"skipped": 0, "failed": 0}
    for candidate in comparison.left_out:
        states["skipped" if candidate.status == "skipped" else "failed"] += 1
    parts = [f"{states['skipped']} {'was' if states['skipped'] == 1 else 'were'} skipped"] if states["skipped"] else []
    parts += [f"{states['failed']} failed"] if states["failed"] else []
    if parts and ranked:
        lines.append(f"Of {plural(len(comparison.compared), 'candidate')}, {series(parts)}: see the reasons below.")
    return lines


def _nothing(comparison: Comparison) -> tuple[str, str]:
    if not comparison.compared:
        return "Nothing was compared", "The record holds no methods."
    if ran := [c for c in comparison.finished if not c.trivial]:
        return "No method has a score", f"{plural(len(ran), 'method')} ran, but the record holds no scores."
    skipped = sum(c.status == "skipped" for c in comparison.compared)
    failed = len(comparison.compared) - skipped
    parts = [f"{failed} failed"] if failed else []
    parts += [f"{skipped} {'was' if skipped == 1 else 'were'} skipped"] if skipped else []
    return "No method finished", f"{series(parts)}; the reasons are below."


def _score(comparison: Comparison, candidate: Candidate) -> str:
    interval = comparison.interval(candidate)
    return f"{comparison.metric} {comparison.score(candidate.mean)}{' ' + interval if interval else ''}"


def _peak(candidate: Candidate) -> str:
    if candidate.peak_bytes is None:
        return ""
    kind = "peak memory" if candidate.measured_peak_bytes is not None else "forecast peak memory"
    return f", {size(candidate.peak_bytes)} {kind}"


def _cost(candidate: Candidate, reference: Candidate) -> str:
    """`", at 0.60× its memory"`, or its time or size if only that is known."""
    for key, noun in (("peak_bytes", "memory"), ("seconds_per_step", "time per step"), ("trained_parameters", "parameters")):
        times = ratio(getattr(candidate, key), getattr(reference, key))
        if times:
            return f", at {times} its {noun}"
    return ""


def _near(chosen: Candidate, near: list[Candidate]) -> str:
    """The methods that do not differ from the best; the one that saves the most memory first."""
    if not near:
        return ""
    known = [c for c in near if ratio(c.peak_bytes, chosen.peak_bytes)]
    lightest = min(known, key=lambda c: c.peak_bytes or math.inf, default=near[0])
    others = [c.label for c in near if c is not lightest]
    saved = (lightest.peak_bytes or math.inf) < 0.95 * (chosen.peak_bytes or 0)
    saving = _cost(lightest, chosen).removeprefix(",").replace("its", "the", 1) if saved else ""
    text = f" {lightest.label} is within noise of it{saving}"
    return text + (f", and so {'is' if len(others) == 1 else 'are'} {_some(others, 2)}." if others else ".")


def _against(comparison: Comparison, chosen: Candidate) -> str:
    baseline = comparison.baseline
    if baseline is None or baseline is chosen or baseline.within_noise:
        return ""
    return f" The baseline, {baseline.label}, reaches {comparison.score(baseline.mean)}."


def _seeds(comparison: Comparison) -> list[str]:
    amounts = sorted({len(c.scores) for c in comparison.ranked if c.scores})
    if not amounts:
        return []
    if amounts[-1] == 1:
        return ["One seed for each method: a difference between two methods may be luck. Repeat with more seeds."]
    lines = []
    if len(amounts) > 1:
        lines.append(
            f"Methods ran with between {amounts[0]} and {plural(amounts[-1], 'seed')}, so intervals are not equally reliable."
        )
    elif amounts[0] < _FEW_SEEDS:
        lines.append(f"{amounts[0]} seeds for each method: enough to see large differences, too few to settle small ones.")
    return lines


def _noise(comparison: Comparison) -> list[str]:
    best = comparison.best
    near = [c.label for c in comparison.ranked if c.within_noise and c is not best]
    if best is None or not near:
        return []
    if len(near) == len(comparison.ranked) - 1:
        return [f"No method differs from {best.label} by more than noise. Choose by memory, time or size."]
    verb = "does" if len(near) == 1 else "do"
    return [f"{_some(near, 4)} {verb} not differ from {best.label} by more than noise."]


def _test_set(comparison: Comparison) -> list[str]:
    """The uncertainty from the test set itself: the binomial interval of an accuracy, which more seeds do not narrow."""
    examples, best = number(comparison.data.get("test")), comparison.best
    if not examples or examples < 2 or best is None or best.mean is None or "accuracy" not in comparison.metric.lower():
        return []
    if not 0 < best.mean < 1:
        return []
    spread = 1.96 * math.sqrt(best.mean * (1 - best.mean) / examples)
    text = f"The test set has {examples:.0f} examples: on other examples like them, an accuracy may differ by ±{spread:.3f}."
    return [text] if spread >= 0.005 else []


def _forecasts(comparison: Comparison) -> list[str]:
    off = {c.label: (c.forecast_peak_bytes or 0) / c.measured_peak_bytes - 1 for c in comparison.finished
           if c.forecast_peak_bytes is not None and c.measured_peak_bytes}  # fmt: skip
    if off:
        worst = max(off, key=lambda label: abs(off[label]))
        if abs(off[worst]) < 0.1:
            return []
        return [f"Forecasts of peak memory are off by up to {abs(off[worst]):.0%} ({worst}); rely on the measurements."]
    if any(c.forecast_peak_bytes is not None for c in comparison.finished):
        return ["Peak memory was forecast from shapes, not measured."]
    return []


def _over(candidate: Candidate, budget: float | None) -> bool:
    return budget is not None and candidate.measured_peak_bytes is not None and candidate.measured_peak_bytes > budget


def _some(names: list[str], most: int = 3) -> str:
    """The first `most` names, and the number of others."""
    if len(names) <= most + 1:
        return series(names)
    return series([*names[:most], f"{len(names) - most} others"])


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def subtitle(comparison: Comparison) -> list[tuple[str, str]]:
    """What was compared, as (term, value) pairs for the line under the title."""
    model, data, settings = comparison.model, comparison.data, comparison.settings
    parts = [
        count(number(model.get("parameters"))) + " parameters" if number(model.get("parameters")) else "",
        plain(model.get("dtype")),
    ]
    sizes = [f"{number(data.get(k)):,.0f} {w}" for k, w in (("train", "train"), ("validation", "validation"), ("test", "test"))
             if number(data.get(k)) is not None]  # fmt: skip
    seeds, steps = settings.get("seeds"), number(settings.get("steps"))
    amount = len(seeds) if isinstance(seeds, (list, tuple)) else number(seeds)
    if comparison.judgement and comparison.judgement.seeds:
        amount = comparison.judgement.seeds
    effort = [f"{steps:,.0f} steps" if steps else "", plural(int(amount), "seed") if amount else ""]
    rows = [
        ("Task", _TASKS.get(comparison.task, comparison.task)),
        ("Model", _with(plain(model.get("name"), 120), parts)),
        ("Data", _with(plain(data.get("name"), 120), sizes)),
        ("Effort", " × ".join(part for part in effort if part)),
        ("Budget", size(comparison.budget) if comparison.budget else ""),
    ]
    return [(term, value) for term, value in rows if value]


def _with(name: str, parts: list[str]) -> str:
    rest = ", ".join(part for part in parts if part)
    return f"{name} ({rest})" if name and rest else name or rest

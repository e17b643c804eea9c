"""What a comparison found, as the page reads it: judgement, search, samples, tables by class; what is invalid is left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lowdim.records import JudgementRecord, MeasuredRate, RatesRecord, SampleRecord, SearchRecord, VisitRecord
from lowdim.report.text import number, plain

__all__ = ["Class", "classes", "items", "judgement", "kept", "mapping", "rates", "samples", "search", "whole"]

_MOST = 20_000  # visits of a search


@dataclass(frozen=True)
class Class:
    """A row of a table by class; a share is None where it is not known."""

    name: str
    precision: float | None
    recall: float | None
    f1: float | None
    count: int | None


def mapping(value: Any) -> Mapping[str, Any]:
    """`value` if it is a mapping, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def items(value: Any) -> Sequence[Any]:
    """`value` if it is a list or tuple, else an empty one."""
    return value if isinstance(value, (list, tuple)) else ()


def whole(value: Any) -> int | None:
    """`value` as an integer, or None for everything that is not a number."""
    known = number(value)
    return None if known is None else round(known)


def judgement(value: Any) -> JudgementRecord | None:
    """The judgement; None where there is none, or one without a headline."""
    record = mapping(value)
    headline = plain(record.get("headline"), 600).strip()
    if not headline:
        return None
    half = number(record.get("half_width"))
    return JudgementRecord(
        level=number(record.get("level")) or 0.95,
        judged=plain(record.get("judged"), 60),
        seeds=whole(record.get("seeds")) or 0,
        examples=whole(record.get("examples")) or 0,
        half_width=half if half is not None and half >= 0 else None,
        may_be_best=_texts(record.get("may_be_best"), 120),
        best=plain(record.get("best"), 120) or None,
        apart=_texts(record.get("apart"), 120),
        headline=headline,
        reasons=_texts(record.get("reasons"), 1000)[:20],
        needed=plain(record.get("needed"), 1000).strip(),
    )


def search(value: Any) -> SearchRecord | None:
    """The search tree; None where no visit is left."""
    record = mapping(value)
    visits = [v for v in map(_visit, items(record.get("visits"))[:_MOST]) if v is not None]
    if not visits:
        return None
    return SearchRecord(
        kind="grid" if plain(record.get("kind"), 20) == "grid" else "halving",
        visits=visits,
        steps=whole(record.get("steps")) or 0,
        exhaustive_steps=whole(record.get("exhaustive_steps")) or 0,
    )


def _visit(value: Any) -> VisitRecord | None:
    record = mapping(value)
    method, lr = plain(record.get("method"), 120), number(record.get("lr"))
    rung, steps = whole(record.get("rung")), whole(record.get("steps"))
    if not method or lr is None or rung is None or steps is None or not 0 <= rung < 100:
        return None
    return VisitRecord(
        method=method,
        lr=lr,
        size=whole(record.get("size")),
        rung=rung,
        steps=steps,
        score=number(record.get("score")),
        goes_on=record.get("goes_on") is True,
        reason=plain(record.get("reason"), 300).strip(),
        origin=plain(record.get("origin"), 40),
    )


def rates(value: Any) -> RatesRecord | None:
    """The measured rates; None where there are none."""
    record = mapping(value)
    found = [rate for rate in map(_rate, items(record.get("rates"))[:1000]) if rate is not None]
    if not found:
        return None
    texts = {name: plain(record.get(name), 2000) for name in ("origin", "judged", "how", "sentence")}
    return RatesRecord(rates=found, **texts)


def _rate(value: Any) -> MeasuredRate | None:
    record = mapping(value)
    method = plain(record.get("method"), 120)
    if not method:
        return None
    half, survived = number(record.get("half_width")), record.get("survived")
    return MeasuredRate(
        method=method,
        label=plain(record.get("label"), 120) or method,
        size=whole(record.get("size")),
        clipped=record.get("clipped") is True,
        reason=plain(record.get("reason"), 600).strip(),
        survived=survived if isinstance(survived, bool) else None,
        steps=whole(record.get("steps")),
        half_width=half if half is not None and half >= 0 else None,
        idle=whole(record.get("idle")) or 0,
        **{name: number(record.get(name)) for name in ("lr", "limit", "eigenvalue", "error", "usual", "difference")},
    )


def samples(value: Any, most: int = 20) -> list[SampleRecord]:
    """What models wrote; samples without an answer are left out."""
    found = []
    for record in map(mapping, items(value)[:most]):
        answers = {plain(name, 120): plain(text, 4000) for name, text in list(mapping(record.get("answers")).items())[:100]}
        if answers:
            prompt, expected = plain(record.get("prompt"), 4000), plain(record.get("expected"), 4000)
            found.append(SampleRecord(prompt=prompt, expected=expected, answers=answers))
    return found


def classes(value: Any) -> list[Class]:
    """A table by class."""
    rows = [mapping(row) for row in items(value)[:1000]]
    return [
        Class(
            name=plain(row["class"], 120),
            precision=number(row.get("precision")),
            recall=number(row.get("recall")),
            f1=number(row.get("f1")),
            count=whole(row.get("count")),
        )
        for row in rows
        if row.get("class") is not None
    ]


def kept(value: Any) -> list[float] | None:
    """The loss on the text that must not be forgotten, before and after."""
    ends = [number(end) for end in items(value)[:2]]
    known = [end for end in ends if end is not None]
    return known if len(known) == 2 else None


def _texts(value: Any, limit: int) -> list[str]:
    return [text for entry in items(value)[:1000] if entry is not None and (text := plain(entry, limit).strip())]

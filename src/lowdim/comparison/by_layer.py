"""`--ranks farms`: a second row for each adapter with ranks by layer, and whether it helped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lowdim.catalogue import BY_FARMS, Variant
from lowdim.comparison.judge import Judgement
from lowdim.comparison.ladder import Ladder, sized
from lowdim.errors import CheckpointError
from lowdim.files import read_json
from lowdim.methods import Setup, strategy_for
from lowdim.methods.exponents import layer_exponents
from lowdim.records import ComparedRun, MethodRecord, RankPair, RanksRecord, difference_text
from lowdim.surgery import find_layers, matrix_shape

if TYPE_CHECKING:
    from lowdim.comparison.runs import Contest
    from lowdim.comparison.setting_up import Field

__all__ = ["enter_twins", "give_sizes", "measure_exponents", "paired", "ranks_record", "without_twins"]


def enter_twins(entered: Field) -> None:
    """Put a row with ranks by layer after each method that can have them.

    Raises:
        ValueError: none can.
    """
    chosen: list[Variant] = []
    named = {each.name for each in entered.chosen}
    for each in entered.chosen:
        chosen.append(each)
        if each.name in entered.skipped or each.ranks != "uniform":
            continue
        if not strategy_for(each).ranks_by_layer():
            entered.plain.append(each.label)
        elif each.name + BY_FARMS not in named:
            chosen.append(each.by_farms())
    if all(each.ranks == "uniform" for each in chosen):
        raise ValueError(
            f"--ranks farms needs a method with a rank in each layer, such as lora, and there is none in "
            f"{', '.join(entered.able)}"
        )
    entered.chosen = chosen


def measure_exponents(entered: Field, contest: Contest) -> None:
    """Give the rows with ranks by layer the exponents of the base: those that an earlier part of the comparison measured.

    Raises:
        ValueError: a method has no ranks by layer, or fewer than two layers can be measured; the others are named.
    """
    twins = [each for each in entered.able.values() if each.ranks == "farms"]
    if not twins:
        return
    for each in twins:
        strategy_for(each).check_ranks()
    earlier = _earlier(contest)
    if earlier is None:
        found = layer_exponents(contest.model, contest.head)
        found.refuse_few()
        entered.exponents = found.alphas
        entered.notes += [f"not measured by FARMS: layer {name}: {reason}" for name, reason in list(found.skipped.items())[:4]]
    else:
        entered.exponents = earlier
    entered.chosen = [each.by_farms(entered.exponents) if each.ranks == "farms" else each for each in entered.chosen]


def _earlier(contest: Contest) -> dict[str, float] | None:
    """What is kept beside the settings, so that a comparison that goes on elsewhere has the same ranks to the last."""
    file = contest.folder / "settings.json"
    kept = read_json(file).get("exponents") if file.is_file() else None
    if kept is None:
        return None
    if not isinstance(kept, dict) or not all(isinstance(value, float) for value in kept.values()):
        raise CheckpointError(f"{file}: exponents must be numbers by layer")
    return kept


def without_twins(entered: Field) -> tuple[list[Variant], dict[str, Variant]]:
    """The methods that are compared without the rows that take their sizes from another, and those."""
    able = entered.able
    twins = {each.name: each for each in able.values() if each.ranks == "farms" and _partner(each.name) in able}
    return [each for each in able.values() if each.name not in twins], twins


def _partner(name: str) -> str:
    return name.removesuffix(BY_FARMS)


def give_sizes(twins: Mapping[str, Variant], ladder: Ladder, contest: Contest) -> None:
    """The sizes of the rows with one rank, but those at which ranks by layer come out the same.

    Raises:
        ValueError: no such row is left; the reasons are named.
    """
    setup = Setup(lr=1e-3, steps=1, head=contest.head)
    layers = {name: min(matrix_shape(layer)) for name, layer in find_layers(contest.model).items()}
    for name, twin in twins.items():
        if (reason := ladder.skipped.get(_partner(name))) is not None:
            ladder.skipped[name] = reason
            continue
        kept: list[int | None] = []
        try:
            for size in ladder.sizes[_partner(name)]:
                ranks = strategy_for(sized(twin, size)).layer_ranks(contest.model, setup)
                if any(rank != min(size or rank, layers.get(layer, rank)) for layer, rank in ranks.items()):
                    kept.append(size)
        except (ValueError, TypeError) as error:
            ladder.skipped[name] = str(error)
            continue
        if kept:
            ladder.sizes[name] = tuple(kept)
            if len(kept) < len(ladder.sizes[_partner(name)]):
                ladder.notes.append(f"{twin.label} has {len(kept)} sizes: at others every layer has the same rank")
        else:
            ladder.skipped[name] = "at each size every layer comes out with the same rank, as without it"
    if twins and all(name in ladder.skipped for name in twins):
        raise ValueError(f"--ranks farms: {'; '.join(dict.fromkeys(ladder.skipped[name] for name in twins))}")


def paired(entered: Field) -> tuple[str, ...]:
    """The rows that are judged against each other, which therefore reach the final."""
    twins = without_twins(entered)[1]
    return tuple(name for twin in twins for name in (_partner(twin), twin))


def ranks_record(
    entered: Field,
    rows: Sequence[MethodRecord],
    runs: Mapping[str, Sequence[ComparedRun]],
    found: Judgement | None,
    judged: str,
) -> RanksRecord | None:
    """What ranks by layer were, and whether they helped; None where no row has them.

    Args:
        rows: of the table.
        runs: method -> its runs of the final.
        judged: what is judged.
    """
    twins = [row for row in rows if row.name in {each.name for each in entered.chosen if each.ranks == "farms"}]
    if not twins or not entered.exponents:
        return None
    by_name = {row.name: row for row in rows}
    pairs = [_pair(row, by_name[_partner(row.name)], found) for row in twins if _partner(row.name) in by_name]
    layers = {row.name: next((run.ranks for run in runs.get(row.name, ()) if run.ranks), {}) for row in twins}
    return RanksRecord(
        exponents=entered.exponents,
        layers={name: dict(ranks) for name, ranks in layers.items() if ranks},
        pairs=pairs,
        plain=list(entered.plain),
        sentence=_sentence(pairs, judged, found is not None and found.one_seed),
    )


def _pair(twin: MethodRecord, plain: MethodRecord, found: Judgement | None) -> RankPair:
    sizes = [plain.size, twin.size]
    if found is None or twin.name not in found.names or plain.name not in found.names:
        return RankPair(method=plain.name, label=plain.label, sizes=sizes)
    difference, width = found.difference(twin.name, plain.name)
    better, worse = found.is_better(twin.name, plain.name), found.is_better(plain.name, twin.name)
    verdict = "better" if better else "worse" if worse else "not distinguishable"
    return RankPair(method=plain.name, label=plain.label, sizes=sizes, difference=difference, half_width=width, verdict=verdict)


def _sentence(pairs: Sequence[RankPair], judged: str, one_seed: bool) -> str:
    """How often ranks by layer were better, with every difference."""
    known = [pair for pair in pairs if pair.difference is not None]
    left = [pair.label for pair in pairs if pair.difference is None]
    missing = f"; not judged: {', '.join(left)}" if left else ""
    if not known:
        return f"Ranks from FARMS were not judged: {', '.join(left)} did not reach the end in both forms." if pairs else ""
    count = {word: sum(pair.verdict == word for pair in known) for word in ("better", "worse", "not distinguishable")}
    shown = [f"better for {count['better']} of {len(known)} {'method' if len(known) == 1 else 'methods'}"]
    shown += [f"{word} for {count[word]}" for word in ("worse", "not distinguishable") if count[word]]
    gaps = ", ".join(_gap(pair, judged) for pair in known)
    doubt = "; one seed shows no difference" if one_seed else ""
    return f"Ranks from FARMS: {', '.join(shown)} ({gaps}; above 0 is better){doubt}{missing}."


def _gap(pair: RankPair, judged: str) -> str:
    assert pair.difference is not None
    own, other = pair.sizes
    sizes = "" if own == other else f", at rank {other} against {own}"
    sign = "+" if pair.difference >= 0 else ""
    return f"{pair.label} {sign}{difference_text(judged, pair.difference, pair.half_width)}{sizes}"

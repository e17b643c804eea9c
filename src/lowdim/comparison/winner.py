"""The winner in a form that other tools load, checked by loading it."""

from __future__ import annotations

import copy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

from lowdim.adapters import load_adapter
from lowdim.catalogue import variant
from lowdim.checksums import check_files
from lowdim.comparison.handing_over import FORMS, form_of_winner, plain_module, weights_in, write_winner
from lowdim.comparison.ladder import sized
from lowdim.comparison.runs import WEIGHTS, Contest
from lowdim.errors import WrittenModelError
from lowdim.files import read_tensors
from lowdim.methods import Setup, strategy_for
from lowdim.outputs import own_files
from lowdim.records import ComparedRun, MethodRecord, WinnerRecord
from lowdim.surgery import model_device
from lowdim.train.tasks.base import Task

__all__ = ["export_winner", "restore", "withdraw_winner"]


def export_winner(bench: Contest, best: MethodRecord, folder: Path, why: str = "") -> WinnerRecord:
    """Write the chosen method's model (of its first seed that worked) to `winner/`; returns its entry in the report.

    It is loaded again with the tool that it is for, and must have the score that was measured. The size of the weights there
    becomes the method's `file_bytes`.

    Raises:
        WrittenModelError: what was kept of the run has another score than was measured, or the folder gives other outputs;
            nothing is left in it.
    """
    runs = folder / "runs" / best.name
    index = next(i for i in range(len(best.scores) + 8) if _usable(runs / f"seed-{i}"))
    record = ComparedRun.read(runs / f"seed-{index}")
    model = restore(bench, runs / f"seed-{index}")
    trained, want = plain_module(model), record.validation
    _check_score(trained, f"the weights of seed {record.seed} of {record.label}", want, bench)
    note = bench.task.finish(trained, bench.head)
    if want is not None and type(bench.task).finish is not Task.finish:  # its answers may be in another unit now
        want = bench.task.evaluate(trained, bench.task.validation, bench.metric)
    form = form_of_winner(model, bench.source)
    place = folder / "winner"
    with own_files(place, folder / "runs" / "winner.json") as draft:
        task, source = bench.task, bench.source
        told = {"processor": task.processor, "joint": task.joint, "inputs": _inputs(bench)}
        written = write_winner(model, draft, bench.model, source=source, **told)
        if form != "peft" or find_spec("peft") is not None:
            _check_score(written.reload(), f"the {FORMS[form]} in {place}, loaded again", want, bench)
    best.file_bytes = weights_in(place)
    return WinnerRecord(
        method=best.name,
        why=why if note is None else f"{why} {note[:1].upper()}{note[1:]}.",
        folder="winner",
        format=FORMS[form],
        exported=f"seed {index + 1}",
        largest_difference=written.largest_difference,
        how_to_load=written.how_to_load,
        file_bytes=best.file_bytes,
        folder_bytes=sum(file.stat().st_size for file in place.rglob("*") if file.is_file()),
    )


def withdraw_winner(folder: Path) -> None:
    """Remove what an earlier call wrote to `winner/`, where now nothing is handed over."""
    if (folder / "winner").is_dir():
        with own_files(folder / "winner", folder / "runs" / "winner.json") as draft:
            draft.mkdir()


def _check_score(model: nn.Module, what: str, want: float | None, bench: Contest) -> None:
    """Score a model once more, on the validation part: the test part is looked at once for each seed.

    Devices may differ in the last digits, and so in one row.

    Raises:
        WrittenModelError: it is not the score that was measured.
    """
    if want is None:
        return
    found = bench.task.evaluate(model.to(model_device(bench.model)), bench.task.validation, bench.metric)
    if not abs(found - want) <= max(1e-3 * abs(want), 1.5 / len(bench.task.validation)):
        raise WrittenModelError(
            f"{what}: {bench.metric.name} {found:.4g} on the validation part, and {want:.4g} was measured after training: "
            "not the model that was measured"
        )


def restore(bench: Contest, run: Path) -> Any:
    """The trained model of a run: an `Adapted`, or a plain module.

    Raises:
        CheckpointError: a file is damaged.
    """
    record = ComparedRun.read(run)
    check_files(run, record.files or {}, f"remove {run / record.file}, and --resume trains that run again")
    base = copy.deepcopy(bench.model)
    if (run / "adapter").is_dir():
        return load_adapter(base, run / "adapter")
    tensors, _ = read_tensors(run / WEIGHTS)
    _swap_back(base, record, bench.scratch)
    missing = base.load_state_dict(tensors, strict=False).unexpected_keys
    if missing:
        raise ValueError(f"{run} does not fit the model: {', '.join(missing[:3])}")
    return base


def _swap_back(model: nn.Module, record: ComparedRun, scratch: bool) -> None:
    """Swap the structured layers in again before their weights are loaded."""
    setup = Setup(lr=record.lr, steps=record.steps, seed=record.seed, scratch=scratch)
    strategy_for(sized(variant(record.method), record.size)).restore(model, setup)


def _usable(run: Path) -> bool:
    if not (run / ComparedRun.file).is_file() or ComparedRun.read(run).failure is not None:
        return False
    return (run / "adapter").is_dir() or (run / WEIGHTS).is_file()


def _inputs(bench: Contest) -> dict[str, Any] | None:
    """Eight rows of the test part, without labels; None where a batch is no dictionary."""
    rows = [bench.task.test[i] for i in range(min(8, len(bench.task.test)))]
    batch: Any = bench.task.collate(rows)
    return {name: value for name, value in batch.items() if name != "labels"} if isinstance(batch, dict) else None

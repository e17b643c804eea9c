"""The winner in a form that other tools load, checked by loading it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from torch import nn

from lowdim import models
from lowdim.adapters import Adapted, load_adapter
from lowdim.catalogue import variant
from lowdim.checksums import check_files
from lowdim.compare.runs import WEIGHTS, Contest
from lowdim.compare.settings import CompareSettings
from lowdim.errors import WrittenModelError
from lowdim.export import export
from lowdim.files import read_tensors
from lowdim.methods import Setup, strategy_for
from lowdim.outputs import own_files
from lowdim.records import ComparedRun, MethodRecord, WinnerRecord

__all__ = ["export_winner", "restore"]


def export_winner(
    bench: Contest, settings: CompareSettings, tokenizer: Any, best: MethodRecord, folder: Path, why: str = ""
) -> WinnerRecord:
    """Export the chosen method's model (of its first seed) to `winner/`; returns its entry in the report.

    The size of the weights there becomes the method's `file_bytes`: a merged model is larger than what a run keeps.

    An adapter with a low-rank update (or that PEFT has itself) is exported as a PEFT folder, everything else merged.

    Raises:
        WrittenModelError: what was kept of the run has another score than was measured, or the folder gives other outputs;
            nothing is left in it.
    """
    runs = folder / "runs" / best.name
    index = next(i for i in range(len(best.scores) + 8) if _usable(runs / f"seed-{i}"))
    run = runs / f"seed-{index}"
    model = restore(bench, run)
    _check_score(model, ComparedRun.read(run), bench)
    kind = "peft" if _exact_in_peft(model) else "merged"
    with own_files(folder / "winner", folder / "runs" / "winner.json") as draft:
        result = export(
            model,
            draft,
            kind,
            tokenizer=tokenizer,
            source=models.resolve(settings.model),
            joint=bench.task.joint,
            inputs=_batch(bench),
        )
    files = [file for file in (folder / "winner").rglob("*") if file.is_file()]
    best.file_bytes = sum(file.stat().st_size for file in files if file.suffix == ".safetensors")
    return WinnerRecord(
        method=best.name,
        why=why,
        folder="winner",
        format="PEFT adapter" if kind == "peft" else "merged model",
        exported=f"seed {index + 1}",
        largest_difference=result.largest_difference,
        how_to_load=result.how_to_load,
        file_bytes=best.file_bytes,
        folder_bytes=sum(file.stat().st_size for file in files),
    )


def _check_score(model: Any, record: ComparedRun, bench: Contest) -> None:
    """Score the model that was kept once more, on the validation part: the test part is looked at once for each seed.

    Devices may differ in the last digits, and so in one text.

    Raises:
        WrittenModelError: it is not the score that was recorded.
    """
    trained: nn.Module = model.model if isinstance(model, Adapted) else model  # many models have a part of that name
    found, want = bench.task.evaluate(trained, bench.task.validation, bench.metric), record.validation
    if want is not None and not abs(found - want) <= max(1e-3 * abs(want), 1.5 / len(bench.task.validation)):
        raise WrittenModelError(
            f"the weights of seed {record.seed} of {record.label} give {bench.metric.name} {found:.4g} on the validation part, "
            f"and {want:.4g} was measured after training: they are not the model that was measured"
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
    strategy_for(variant(record.method)).restore(model, setup)


def _usable(run: Path) -> bool:
    if not (run / ComparedRun.file).is_file() or ComparedRun.read(run).failure is not None:
        return False
    return (run / "adapter").is_dir() or (run / WEIGHTS).is_file()


def _exact_in_peft(model: Any) -> bool:
    layers = getattr(model, "layers", None)
    if not isinstance(layers, dict):
        return False
    thin = bool(layers) and all(layer.update.low_rank_delta() is not None for layer in layers.values())
    return thin or model.method.peft(model) is not None


def _batch(bench: Contest) -> dict[str, Any]:
    """Eight rows of the test part, without labels."""
    rows = [bench.task.test[i] for i in range(min(8, len(bench.task.test)))]
    return {name: value for name, value in bench.task.collate(rows).items() if name != "labels"}

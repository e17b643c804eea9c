"""Write an adapter, or the result of a run, for other tools; detects the base model and the task."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowdim.errors import DataError, UnknownNameError, check_choice
from lowdim.jobs.adapted import load_adapted
from lowdim.outputs import new_folder

__all__ = ["ExportSettings", "export"]


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """One export.

    Attributes:
        adapter: a folder of `adapted.save`, of PEFT, of `lowdim run`, or of a run of a comparison.
        out: the folder that is written.
        model: the base model; None uses the name in the adapter's record.
        format: `"peft"` or `"merged"`.
        rank: to which updates of full rank are truncated.
        task: `"classify"` or `"causal-lm"`; None detects it.
        target: `"vllm"` or `"llamacpp"`: a LoRA that it loads, checked first.
        max_error: choose each layer's rank by this relative error.
    """

    adapter: Path
    out: Path
    model: str | None = None
    format: str = "peft"
    rank: int | None = None
    task: str | None = None
    target: str | None = None
    max_error: float | None = None


def export(settings: ExportSettings) -> Any:
    """Write an adapter, or a whole run of `lowdim run`, for other tools.

    Returns:
        `lowdim.export.ExportResult`.

    Raises:
        CheckpointError, DataError: there is no adapter, it is damaged, or its model is unknown.
        FileExistsError: the folder is not empty.
        InUseError: another command works on it.
        ValueError: the model cannot be exported this way.
    """
    from lowdim import models
    from lowdim.adapters.core.files.peft_targets import TARGETS
    from lowdim.export import FORMATS
    from lowdim.export import export as write

    check_choice("--format", settings.format, FORMATS)
    if settings.target is not None:
        check_choice("--for", settings.target, TARGETS)
    with new_folder(settings.out):
        name, adapted = _load(settings)
        return write(
            adapted,
            settings.out,
            settings.format,
            tokenizer=_tokenizer(name),
            source=models.resolve(name),
            rank=settings.rank,
            max_error=settings.max_error,
            target=settings.target,
            joint=_joint(settings.adapter),
        )


def _joint(folder: Path) -> str | None:
    """What stands between the texts of the pairs that a run has classified; None for single texts."""
    from lowdim.records import RUN, RunRecord

    found = (
        RunRecord.read(folder).data.get("joint") if (folder / "recipe.yaml").is_file() and (folder / RUN).is_file() else None
    )
    return found if isinstance(found, str) else None


def _tokenizer(name: str) -> Any:
    """What turns inputs into the model's, to be saved next to a merged model; None where the base model has nothing of it."""
    from lowdim import models

    try:
        return models.load_tokenizer(name)
    except UnknownNameError:
        return models.load_processor(name)


def _load(settings: ExportSettings) -> tuple[str, Any]:
    """The base model's name, and the model with the adapter attached."""
    from lowdim.train.run import load_run

    folder = settings.adapter
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; name one that `lowdim run` or `adapted.save` wrote")
    if (folder / "run.json").is_file() and (folder / "recipe.yaml").is_file():
        adapted, recipe, _ = load_run(folder)
        if settings.format == "peft" and not recipe.pretrained:
            raise ValueError(f"{folder} started from random weights, which no other tool has; export it with --format merged")
        return recipe.model, adapted
    if (folder / "adapter").is_dir():  # a run of a comparison
        folder = folder / "adapter"
    return load_adapted(folder, model=settings.model, task=settings.task)

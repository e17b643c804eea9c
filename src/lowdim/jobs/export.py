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
        rank: the highest rank of a layer that is written; None cuts no update that is low-rank.
        task: `"classify"` or `"causal-lm"`; None detects it.
        target: `"vllm"` or `"llamacpp"`: a LoRA that it loads, checked first.
        max_error: choose each layer's rank by this relative error.
        keep_mask: weights of the base that are exactly 0 stay 0, for `"merged"`.
    """

    adapter: Path
    out: Path
    model: str | None = None
    format: str = "peft"
    rank: int | None = None
    task: str | None = None
    target: str | None = None
    max_error: float | None = None
    keep_mask: bool = False


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
    if settings.keep_mask and settings.format != "merged":
        raise ValueError(f"--keep-mask is for --format merged, which writes weights; got --format {settings.format}")
    if settings.target is not None:
        check_choice("--for", settings.target, TARGETS)
    with new_folder(settings.out):
        if settings.format == "merged" and (settings.rank, settings.max_error, settings.target, settings.task) == (None,) * 4:
            by_shards = None if settings.keep_mask else _by_shards(settings)
            if by_shards is not None:
                return by_shards
        name, adapted = _load(settings)
        return write(
            adapted,
            settings.out,
            settings.format,
            tokenizer=_tokenizer(name, settings.adapter),
            source=models.resolve(name),
            rank=settings.rank,
            max_error=settings.max_error,
            target=settings.target,
            joint=_joint(settings.adapter),
            keep_mask=settings.keep_mask,
        )


def _by_shards(settings: ExportSettings) -> Any | None:
    """The base model's files with the adapter merged, where they can be written without loading the model; else None.

    A run from random weights, and one that has trained a whole model, have no such files.
    """
    from lowdim import models
    from lowdim.jobs.adapted import described, holds_adapter
    from lowdim.jobs.merge_shards import merge_shards
    from lowdim.records import RUN, RunRecord

    folder, name = settings.adapter, settings.model
    if (folder / RUN).is_file() and (folder / "recipe.yaml").is_file():
        recipe = RunRecord.read(folder).recipe
        if not recipe.get("pretrained", True) or not isinstance(recipe.get("model"), str):
            return None
        name = recipe["model"]
    place = folder / "adapter" if (folder / "adapter").is_dir() else folder
    if not place.is_dir() or not holds_adapter(place):
        return None
    name = name or described(place).base
    return merge_shards(place, settings.out, models.resolve(name)) if name else None


def _joint(folder: Path) -> str | None:
    """What stands between the texts of the pairs that a run has classified; None for single texts."""
    from lowdim.records import RUN, RunRecord

    found = (
        RunRecord.read(folder).data.get("joint") if (folder / "recipe.yaml").is_file() and (folder / RUN).is_file() else None
    )
    return found if isinstance(found, str) else None


def _tokenizer(name: str, folder: Path) -> Any:
    """What turns inputs into the model's, to be saved next to a merged model; None where the base model has nothing of it.

    The adapter's own tokenizer comes first: it may hold the chat template that was trained with.

    Raises:
        DataError: the adapter's own cannot be read.
    """
    from lowdim import models

    own = next((place for place in (folder / "adapter", folder) if (place / "tokenizer_config.json").is_file()), None)
    if own is not None:
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(str(own), trust_remote_code=False)
        except Exception as error:  # transformers raises various errors for a damaged folder
            raise DataError(f"{own}: its tokenizer cannot be read ({' '.join(str(error).split())[:200]})") from error
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

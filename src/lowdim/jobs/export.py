"""Write an adapter, or the result of a run, for other tools; detects the base model and the task."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowdim.errors import CheckpointError, DataError, check_choice
from lowdim.outputs import new_folder

__all__ = ["ExportSettings", "export"]


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """One export.

    Attributes:
        adapter: a folder of `adapted.save`, of `lowdim run`, or of a run of a comparison.
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
            tokenizer=models.load_tokenizer(name),
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


def _load(settings: ExportSettings) -> tuple[str, Any]:
    """The base model's name, and the model with the adapter attached."""
    from lowdim import models
    from lowdim.adapters import load_adapter
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
    base, labels = _description(folder)
    name = settings.model or base
    if not name:
        raise DataError(f"{folder} does not say which model it is for; name it with --model")
    kind = settings.task or ("classify" if labels else "causal-lm")
    pad = models.load_tokenizer(name).pad_token_id
    return name, load_adapter(models.load_model(name, kind, num_labels=labels or 2, pad_token_id=pad), folder)


def _description(folder: Path) -> tuple[str | None, int]:
    """The base model that an adapter names, and the number of classes of its head (0 without a head)."""
    from lowdim.adapters.core.files.layout import TENSORS, read_adapter
    from lowdim.surgery import HEAD_NAMES

    if not (folder / TENSORS).is_file() and (folder / "adapter_config.json").is_file():
        raise CheckpointError(f"{folder} already holds a PEFT adapter; load it with peft.PeftModel.from_pretrained")
    tensors, header = read_adapter(folder)
    heads = tuple(f"{name}." for name in header.modules_to_save if name.rpartition(".")[2] in HEAD_NAMES)
    sizes = [len(t) for key, t in sorted(tensors.items()) if t.ndim == 2 and heads and key.startswith(heads)]
    return header.base, sizes[-1] if sizes else 0  # the last matrix of a head gives the logits

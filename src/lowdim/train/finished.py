"""A finished run, read back: its record, and its trained model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowdim import models
from lowdim.catalogue import Variant, variant
from lowdim.checksums import check_files, checksums
from lowdim.errors import CheckpointError
from lowdim.methods import with_options, with_ranks
from lowdim.records import RUN, RunRecord
from lowdim.train.fingerprint import check_fingerprint
from lowdim.train.loading import load_base, recipe_processor
from lowdim.train.recipes import Recipe

__all__ = ["finished", "load_run", "weight_bytes", "written"]

_MODELS = ("adapter", "model")  # the folder of the trained model


def finished(folder: Path, fingerprint: Mapping[str, str]) -> RunRecord | None:
    """The record of an earlier run that is whole; None if a part of it is missing, so that it goes on from its checkpoint.

    Args:
        fingerprint: what the run builds on now.

    Raises:
        CheckpointError: it was made from something else, or is damaged.
    """
    if not (folder / RUN).is_file():
        return None
    record = RunRecord.read(folder)
    check_fingerprint(fingerprint, record.fingerprint, folder)
    if not any((folder / name).is_dir() for name in _MODELS):
        return None
    check_files(folder, record.files, f"remove {folder / RUN}, and --resume writes it again")
    return record


def load_run(folder: str | Path) -> tuple[Any, Recipe, Variant]:
    """The trained model of a finished run (an `Adapted`), its recipe and its method.

    Raises:
        CheckpointError: the folder holds no finished run, or a whole model and no adapter.
    """
    from lowdim.adapters import load_adapter

    folder = Path(folder)
    record = RunRecord.read(folder)
    try:
        recipe = Recipe(**record.recipe)
        labels = int(record.data.get("outputs") or max(2, len(record.data["labels"])))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / RUN} is not the record of a recipe run") from error
    chosen = with_ranks(with_options(variant(recipe.method), recipe.options), recipe.ranks)
    if not (folder / "adapter").is_dir():
        raise CheckpointError(f"{folder} holds no adapter; its model is in {folder / 'model'}, ready to use")
    base = load_base(recipe, labels, recipe_processor(recipe), record.data.get("problem"))
    models.name_classes(base, record.data["labels"])
    return load_adapter(base, folder / "adapter"), recipe, chosen


def weight_bytes(folder: Path) -> int:
    """The size of the trained model's tensors as they were written."""
    return sum(file.stat().st_size for name in _MODELS for file in (folder / name).rglob("*.safetensors"))


def written(folder: Path) -> dict[str, str]:
    """The checksums of the trained model's tensors and descriptions; texts such as README.md may be edited."""
    found = {f"{name}/{file}": value for name in _MODELS for file, value in checksums(folder / name).items()}
    return {name: value for name, value in found.items() if name.endswith((".safetensors", ".json"))}

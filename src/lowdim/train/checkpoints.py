"""Checkpoints of a run: complete once their manifest is written, checked file by file before they are used, kept by step."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from lowdim.checksums import check_files, checksums
from lowdim.errors import CheckpointError
from lowdim.files import read_json, read_json_object, write_json
from lowdim.train.fingerprint import check_fingerprint

__all__ = ["MANIFEST", "checkpoint_errors", "complete", "discard", "newest_checkpoint", "rotate", "step_of"]

MANIFEST = "manifest.json"
_REMEDY = "remove that folder, and --resume continues from the checkpoint before it, or from the beginning"


def complete(checkpoint: Path, fingerprint: Mapping[str, str]) -> None:
    """Write the manifest of a checkpoint whose other files are all written: their checksums, and what the run builds on."""
    files = checksums(checkpoint, without=[MANIFEST])
    write_json(checkpoint / MANIFEST, {"fingerprint": dict(fingerprint), "files": files}, sealed=True)


def newest_checkpoint(folder: Path, fingerprint: Mapping[str, str] | None = None) -> str | None:
    """The newest complete checkpoint, or None.

    Raises:
        CheckpointError: one of its files is damaged, or what the run builds on (`fingerprint`) has changed.
    """
    whole = [path for path in _by_step(folder) if _is_complete(path)]
    if not whole:
        return None
    newest = whole[-1]
    with checkpoint_errors(newest):
        if (newest / MANIFEST).exists():
            manifest = read_json_object(newest / MANIFEST)
            check_files(newest, manifest["files"], _REMEDY)
            if fingerprint is not None:
                check_fingerprint(fingerprint, manifest["fingerprint"], folder.parent)
        _check_state(newest)
    return str(newest)


def _is_complete(checkpoint: Path) -> bool:
    """Whether all was written: the trainer writes its state last, and then we the manifest (earlier versions wrote none)."""
    if (checkpoint / MANIFEST).exists():
        return True
    try:
        return bool(read_json(checkpoint / TRAINER_STATE_NAME))
    except CheckpointError:
        return False


def _check_state(checkpoint: Path) -> None:
    state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    history = read_json_object(checkpoint / TRAINER_STATE_NAME).get("log_history", [])
    if type(state.global_step) is not int or state.global_step != step_of(checkpoint):
        raise ValueError(f"{TRAINER_STATE_NAME} is of step {state.global_step!r}")
    if not isinstance(history, list) or not all(isinstance(entry, dict) for entry in history):
        raise ValueError(f"log_history in {TRAINER_STATE_NAME} is not a list of objects")


def rotate(folder: Path, keep: int, step: int) -> None:
    """Remove all checkpoints up to this step except the newest complete ones; clocks play no part."""
    earlier = [path for path in _by_step(folder) if step_of(path) <= step]
    kept = [path for path in earlier if _is_complete(path)][-keep:]
    for path in earlier:
        if path not in kept:
            discard(path)


def discard(checkpoint: Path) -> None:
    """Remove a checkpoint; first what makes it seem complete, since a kill may leave the rest."""
    for name in (TRAINER_STATE_NAME, MANIFEST):
        (checkpoint / name).unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)


@contextmanager
def checkpoint_errors(checkpoint: str | Path | None) -> Iterator[None]:
    """Turn any error while reading a checkpoint into one that says how to continue."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # torch, safetensors, zip files and the system each raise their own error
        reason = " ".join(str(error).split())[:160]
        raise CheckpointError(f"{checkpoint} cannot be read ({reason}); {_REMEDY}") from error


def _by_step(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step of a checkpoint, from its name."""
    return int(checkpoint.name.rpartition("-")[2])

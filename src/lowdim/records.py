"""The records that `lowdim run` and `lowdim compare` write of each training, as types that write and read them.

The files are JSON. A field with a default is omitted while it is empty, so that adding fields does not change other records.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowdim.errors import CheckpointError
from lowdim.files import read_json, write_json

__all__ = ["RUN", "RunRecord", "claim"]

RUN = "run.json"


def claim(folder: Path, marker: str, what: str, resume: bool) -> Path | None:
    """The file `marker` of an earlier `what` (a run, a comparison) to continue in the folder, or None in a new folder.

    Raises:
        FileExistsError: the folder is a file, holds something else, or holds an earlier one and `resume` is False.
    """
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; name a folder with --out")
    earlier = folder / marker
    if not earlier.is_file():
        if folder.is_dir() and any(folder.iterdir()):
            raise FileExistsError(f"{folder} is not empty and holds no {what}; name another folder with --out")
        return None
    if not resume:
        raise FileExistsError(f"{folder} already holds a {what}; continue it with --resume, or name another folder with --out")
    return earlier


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """A finished run of a recipe.

    Attributes:
        method, label: its name, and its name in tables.
        recipe: all keys of the recipe.
        config: the method's hyperparameters with all defaults filled in.
        trained_parameters: number of trained parameters at the start.
        metric, before, validation, test: its name, and the scores of the three.
        data: name, sizes of the parts, notes, labels.
        losses, loss_steps: of each logged step, without penalties.
        evaluations: `[step, loss]` of the validation part during training.
        subspaces, spikes: the log of a projected optimizer, and the steps whose loss jumped.
        seconds_per_step, measured_peak_bytes: the median, and the peak of one step.
        environment, lowdim: versions and hardware.
        penalties: the terms that the method added to the losses, if any.
        ranks: layer -> rank at the end, if the method chooses them.

    Example:
        >>> import dataclasses
        >>> from lowdim.records import RunRecord
        >>> [f.name for f in dataclasses.fields(RunRecord)][:3]
        ['schema', 'method', 'label']
    """

    schema: int = 1
    method: str
    label: str
    recipe: dict[str, Any]
    config: dict[str, Any]
    lr: float
    seed: int
    trained_parameters: int
    metric: str
    before: float
    validation: float
    test: float
    data: dict[str, Any]
    losses: list[float]
    loss_steps: list[int]
    evaluations: list[list[float]]
    subspaces: list[dict[str, float]]
    spikes: list[int]
    seconds_per_step: float
    measured_peak_bytes: int | None
    environment: dict[str, Any]
    lowdim: str
    penalties: list[float] = field(default_factory=list)
    ranks: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The record as written to `run.json`."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if value or name not in ("penalties", "ranks")}

    def write(self, folder: Path) -> None:
        """Write `run.json` into the folder, atomically."""
        write_json(folder / RUN, self.to_dict())

    @classmethod
    def read(cls, folder: Path) -> RunRecord:
        """The record of the run in a folder.

        Raises:
            CheckpointError: there is no record, or it is not that of a recipe.
        """
        values = read_json(folder / RUN)
        known = {f.name for f in dataclasses.fields(cls)}
        try:
            return cls(**{name: value for name, value in values.items() if name in known})
        except (AttributeError, TypeError) as error:
            raise CheckpointError(f"{folder / RUN} is not the record of a recipe run") from error

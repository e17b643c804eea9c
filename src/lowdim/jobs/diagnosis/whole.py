"""The diagnosis of a whole model: layer by layer, then on data; what refuses the model leaves its reason."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowdim.errors import LowdimError, check_float, check_int
from lowdim.files import write_json
from lowdim.jobs.diagnosis.layers import LayerDiagnosis, measure_layer
from lowdim.jobs.measures import model_and_batch, weights_source
from lowdim.results import Result

if TYPE_CHECKING:
    from lowdim.diagnose import Weights

__all__ = ["Diagnosis", "DiagnosisSettings", "diagnose_all", "write_diagnosis"]

#: What a diagnostic raises where it does not fit a model: its reason goes on the page.
_REFUSALS = (LowdimError, ValueError, TypeError, NotImplementedError, ArithmeticError)
_LANCZOS_BYTES = 2**31  # of the vectors that the curvature's Lanczos steps keep


@dataclass(frozen=True, kw_only=True)
class DiagnosisSettings:
    """What to diagnose.

    Attributes:
        model: a module, a mapping of tensors, or a name: a folder (with or without shards, also of an adapter or a run), a
            safetensors or GGUF file, one of lowdim's names.
        base: the model before tuning, as `model`; None leaves out what compares the two.
        data: files of texts; without them nothing is measured on data, and without labels in them no over-training.
        k: leading directions that are compared with the base's, >= 1.
        threshold: similarity below which a direction is an intruder, in (0, 1].
        rows: rows of FARMS' windows, >= 1.
    """

    model: Any
    base: Any = None
    data: tuple[str, ...] = ()
    k: int = 10
    threshold: float = 0.5
    rows: int = 128

    def __post_init__(self) -> None:
        check_int("k", self.k, 1)
        check_float("threshold", self.threshold, 0.0, 1.0, low_open=True)
        check_int("rows", self.rows, 1)


@dataclass(frozen=True)
class Diagnosis(Result):
    """Everything that was measured; `rows()` and `to_dataframe()` have one row for each layer.

    Attributes:
        model, base, data: what was measured.
        layers: in the model's order.
        skipped: weight -> why it was not measured.
        on_data: name -> result of each diagnostic that ran on data.
        not_measured: diagnostic -> why it did not run.
        k, threshold, window_rows: the settings.
        seconds: it took.
    """

    model: str
    base: str | None
    data: tuple[str, ...]
    layers: list[LayerDiagnosis]
    skipped: dict[str, str]
    on_data: dict[str, Any] = field(repr=False)
    not_measured: dict[str, str]
    k: int
    threshold: float
    window_rows: int
    seconds: float

    def rows(self) -> list[dict[str, Any]]:
        """A row for each layer."""
        rows = [{**layer.to_dict(), "shape": "x".join(map(str, layer.shape))} for layer in self.layers]
        return [{key: value for key, value in row.items() if key != "spectrum"} for row in rows]

    def _table(self) -> list[dict[str, Any]]:
        shown = ("name", "alpha", "alpha_error", "full_alpha", "half_error", "strength", "intruders", "overlap")
        return [{key: row[key] for key in shown if self.base is not None or row[key] is not None} for row in self.rows()]

    @property
    def summary(self) -> str:
        """One line."""
        alphas = sorted(layer.alpha for layer in self.layers)
        text = f"{len(alphas)} layers, alpha {alphas[0]:.2f} to {alphas[-1]:.2f}"
        if self.base is not None:
            strengths = [layer.strength or 0.0 for layer in self.layers]
            text += f"; changed by up to {max(strengths):.2%}, {sum(layer.intruders or 0 for layer in self.layers)} intruders"
        return text


def diagnose_all(settings: DiagnosisSettings, *, say: Callable[[str], None] = lambda line: None) -> Diagnosis:
    """Measure a model: spectra and exponents, what tuning changed, and on data what its attention and its loss are like.

    Weights are read one layer at a time, so that a checkpoint larger than memory can be measured; diagnostics on data need the
    model itself.

    Args:
        say: told of progress.

    Returns:
        Diagnosis. Diagnostics that refuse the model are in `not_measured`, with their reasons.

    Raises:
        ValueError: options out of range, nothing to measure, a weight that is not finite (the layer is named), a base with
            other layers. DataError, UnknownNameError, CheckpointError: a source that cannot be read.

    Example:
        >>> from lowdim.jobs.diagnosis import DiagnosisSettings, diagnose_all
        >>> done = diagnose_all(DiagnosisSettings(model="stories260k", rows=32))
        >>> len(done.layers), done.not_measured["lora-limits"]
        (35, 'it needs data')
    """
    from lowdim.diagnose import weights_of

    start = time.perf_counter()
    weights = weights_of(_source(settings.model))
    base = None if settings.base is None else weights_of(_source(settings.base)).oriented_like(weights)
    if base is not None:
        weights = weights.oriented_like(base)
    layers, skipped = _layers(settings, weights, base, say)
    on_data: dict[str, Any] = {}
    left_out: dict[str, str] = (
        {} if base is not None else dict.fromkeys(("intruders", "overlap", "strength"), "it needs a base")
    )
    for name, measure in _ON_DATA.items():
        if not settings.data:
            left_out[name] = "it needs data"
            continue
        say(f"{name} on {', '.join(settings.data)}")
        try:
            on_data[name] = measure(settings)
        except _REFUSALS as error:
            left_out[name] = str(error)
    return Diagnosis(
        model=_label(settings.model),
        base=None if settings.base is None else _label(settings.base),
        data=settings.data,
        layers=layers,
        skipped=skipped,
        on_data=on_data,
        not_measured=left_out,
        k=settings.k,
        threshold=settings.threshold,
        window_rows=settings.rows,
        seconds=time.perf_counter() - start,
    )


def write_diagnosis(done: Diagnosis, folder: str | Path, *, command: str = "") -> tuple[Path, Path, Path]:
    """Write `diagnose.html`, `diagnose.json` and `layers.csv` (one row for each layer) to a folder.

    Raises:
        OSError: no space or no permission.
    """
    import csv
    import io

    from lowdim.files import write_text
    from lowdim.report import write_diagnosis_page
    from lowdim.train.environment import environment

    folder = Path(folder)
    made = {"created": datetime.now(UTC).isoformat(timespec="seconds"), "command": command, "environment": environment()}
    record = {**done.to_dict(), **made}
    table, rows = io.StringIO(), done.rows()
    writer = csv.DictWriter(table, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return (
        write_diagnosis_page(record, folder / "diagnose.html"),
        write_json(folder / "diagnose.json", record, sealed=True),
        write_text(folder / "layers.csv", table.getvalue()),
    )


def _layers(
    settings: DiagnosisSettings, weights: Weights, base: Weights | None, say: Callable[[str], None]
) -> tuple[list[LayerDiagnosis], dict[str, str]]:
    from lowdim.diagnose.farms.spectrum import EXCLUDED

    layers: list[LayerDiagnosis] = []
    skipped: dict[str, str] = {}
    first = weights.first_names()
    if base is not None and not any(name in base for name in weights):
        raise ValueError(f"base: {base.origin} has none of the weights of {weights.origin}; it must be the model before tuning")
    for done, name in enumerate(weights, 1):
        if first[name] != name:
            skipped[name] = f"the same tensor as {first[name]}"
            continue
        if any(part in name for part in EXCLUDED):
            skipped[name] = "an embedding: its rows are looked up, not multiplied"
            continue
        found = _layer(settings, name, weights, base)
        if isinstance(found, str):
            skipped[name] = found
        else:
            layers.append(found)
        if done % 10 == 0 or done == len(weights):
            say(f"{done} of {len(weights)} weights")
    if not layers:
        why = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:3]) or "it has no 2-D weight"
        raise ValueError(f"nothing to measure in {weights.origin}: {why}")
    return layers, skipped


def _layer(settings: DiagnosisSettings, name: str, weights: Weights, base: Weights | None) -> LayerDiagnosis | str:
    """The numbers of a layer, or why there are none; its weights are in memory only here."""
    from lowdim.diagnose import farms
    from lowdim.diagnose.farms.spectrum import NothingToMeasureError

    if base is not None and name not in base:
        return "the base has no such weight"
    if base is not None and base.shape(name) != weights.shape(name):
        shapes = f"{weights.shape(name)} and {base.shape(name)}"
        raise ValueError(f"layer {name}: model and base must have the same shape; got {shapes}")
    weight = weights[name]
    try:
        (windows,) = farms({name: weight}, rows=settings.rows).layers
    except NothingToMeasureError as error:
        return error.reasons[name]
    before = None if base is None else base[name]
    return measure_layer(windows, weight, before, k=settings.k, threshold=settings.threshold)


def _source(given: Any) -> Any:
    return weights_source(str(given)) if isinstance(given, (str, Path)) else given


def _label(given: Any) -> str:
    return str(given) if isinstance(given, (str, Path)) else type(given).__name__


def _lora_limits(settings: DiagnosisSettings) -> Any:
    from lowdim.diagnose import lora_limits_of

    if not isinstance(settings.model, (str, Path)):
        raise ValueError("the model must be given by its folder or name; in Python use lowdim.diagnose.lora_limits_of")
    model, batch = model_and_batch({"model": settings.model, "data": settings.data})
    kind = str(getattr(getattr(model, "config", None), "model_type", ""))
    if kind in ("bert", "roberta", "electra"):
        return lora_limits_of(model, batch, query="query", key="key", value="value")
    return lora_limits_of(model, batch)


def _batch_lr(settings: DiagnosisSettings) -> Any:
    from lowdim.diagnose import weights_of
    from lowdim.jobs.curvature import batch_lr

    if not isinstance(settings.model, (str, Path)):
        raise ValueError("the model must be given by its folder or name; in Python use lowdim.diagnose.batch_spectrum")
    weights = weights_of(_source(settings.model))
    count = sum(math.prod(weights.shape(name)) for name in weights)
    steps = min(10, int(_LANCZOS_BYTES // (4 * count)))
    if steps < 3:
        raise ValueError(
            f"it keeps several vectors of {count:,} numbers; lowdim diagnose batch-lr measures it with --option steps"
        )
    how: dict[str, Any] = {"steps": steps, "batches": 2, "probes": 1, "samples": 16, "max_length": 32}
    return batch_lr(str(settings.model), settings.data, batch_size=8, **how)


def _dynamics(settings: DiagnosisSettings) -> Any:
    from lowdim.jobs.curvature import generalization_dynamics

    if not isinstance(settings.model, (str, Path)):
        raise ValueError("the model must be given by its folder or name; in Python use lowdim.diagnose.feature_dynamics")
    return generalization_dynamics(str(settings.model), settings.data, samples=200, max_length=32)


#: Diagnostics that run on data, by the names of `lowdim list diagnose`.
_ON_DATA: dict[str, Callable[[DiagnosisSettings], Any]] = {
    "lora-limits": _lora_limits,
    "batch-lr": _batch_lr,
    "generalization-dynamics": _dynamics,
}

"""Expected numbers: `load("galore", "adamw_tall")` gives tensors, metadata and a comparison at the case's tolerance."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

ROOT = Path(__file__).parent / "vectors"


@dataclass
class Case:
    tensors: dict[str, Tensor]
    source: str
    tolerance: float
    hyperparameters: dict
    metadata: dict[str, str]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def close(self, got: Tensor, want: str | Tensor, scale: float | None = None) -> None:
        """Largest error relative to the largest entry of what is wanted (or to `scale`) within the case's tolerance."""
        expected = self.tensors[want] if isinstance(want, str) else want
        assert got.shape == expected.shape, f"{want}: shape {tuple(got.shape)}, want {tuple(expected.shape)}"
        size = scale if scale is not None else max(float(expected.abs().max()), 1e-30)
        error = float((got.detach().to(expected.dtype) - expected).abs().max()) / size
        assert error <= self.tolerance, f"{want}: relative error {error:.3g} > {self.tolerance:.3g}"


def load(slug: str, case: str) -> Case:
    with safe_open(ROOT / slug / f"{case}.safetensors", "pt") as file:
        metadata = dict(file.metadata() or {})
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    hyper = json.loads(metadata.get("hyperparameters", "{}"))
    number = re.search(r"\d+(\.\d+)?e-\d+|\d*\.\d+", metadata.get("tolerance", "1e-8"))
    tolerance = float(number.group()) if number else 0.0  # "exact"
    return Case(tensors, metadata.get("source", ""), tolerance, hyper, metadata)


def cases(slug: str) -> list[str]:
    return sorted(path.stem for path in (ROOT / slug).glob("*.safetensors"))

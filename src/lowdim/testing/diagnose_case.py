"""Tests of every diagnostic of weights: those of every result, and the same result from a module, a dict or files.

A diagnostic that reads no weights (a function of numbers, of a measure, of one layer's input) has a `ResultCase`, or a
`ValueCase` if it returns plain numbers.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from lowdim.testing.result_case import ResultCase

__all__ = ["DiagnoseCase", "save_sharded"]


def save_sharded(tensors: dict[str, torch.Tensor], folder: Path, shards: int = 2) -> Path:
    """A checkpoint folder with an index, as transformers writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    weight_map = {}
    for i in range(shards):
        name = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {key: tensors[key].contiguous() for key in list(tensors)[i::shards]}
        save_file(part, folder / name)
        weight_map.update(dict.fromkeys(part, name))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


class DiagnoseCase(ResultCase):
    """Subclass in a test file: define the models and the measurement, and write `expected` as a formula."""

    @abstractmethod
    def models(self) -> tuple[nn.Module, ...]:
        """The diagnostic's arguments as modules, the same numbers at each call."""

    @abstractmethod
    def measure(self, *sources: Any) -> Any:
        """The result for modules, mappings or paths."""

    def result(self) -> Any:
        """The measurement of the models."""
        return self.measure(*self.models())

    def test_module_dict_file_and_shards_agree(self, tmp_path: Path):
        """The source of the weights makes no difference."""
        models = self.models()
        dicts = [model.state_dict() for model in models]
        want = self.measure(*models).to_dict()
        assert self.measure(*dicts).to_dict() == want
        files, folders = [], []
        for i, tensors in enumerate(dicts):
            save_file(tensors, tmp_path / f"{i}.safetensors")
            files.append(tmp_path / f"{i}.safetensors")
            folders.append(save_sharded(tensors, tmp_path / f"folder{i}"))
        assert self.measure(*files).to_dict() == want
        assert self.measure(*map(str, folders)).to_dict() == want
        assert self.measure(models[0], *folders[1:]).to_dict() == want

    def test_models_are_left_as_they_were(self):
        """Measuring changes nothing and leaves no gradients."""
        models = self.models()
        before = [{k: v.clone() for k, v in model.state_dict().items()} for model in models]
        self.measure(*models)
        for model, old in zip(models, before, strict=True):
            assert all(torch.equal(v, old[k]) for k, v in model.state_dict().items())
            assert all(p.grad is None for p in model.parameters())

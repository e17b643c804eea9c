"""What every diagnostic of weights owes: JSON, a table, a plot, and the same answer from a module, a dict or files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from lowdim.testing.represent_case import Refusal, refuses

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


class DiagnoseCase:
    """Subclass in a test file; name the models that are measured and the measurement."""

    def models(self) -> tuple[nn.Module, ...]:
        """The diagnostic's arguments as modules, the same numbers at each call."""
        raise NotImplementedError

    def measure(self, *sources: Any) -> Any:
        """The result for modules, mappings or paths."""
        raise NotImplementedError

    def refusals(self) -> list[Refusal]:
        """Wrong uses."""
        raise NotImplementedError

    def test_to_dict_is_json_and_repeats(self):
        """The record survives JSON and is the same at each run."""
        first, second = (self.measure(*self.models()).to_dict() for _ in range(2))
        assert first == second
        assert json.loads(json.dumps(first, allow_nan=False)) == first

    def test_module_dict_file_and_shards_agree(self, tmp_path: Path):
        """Where the weights come from makes no difference."""
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
        for model, old in zip(models, before):
            assert all(torch.equal(v, old[k]) for k, v in model.state_dict().items())
            assert all(p.grad is None for p in model.parameters())

    def test_table_and_plot(self):
        """Both work and are not empty."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt

        result = self.measure(*self.models())
        assert len(result.to_dataframe()) > 0
        axes = result.plot()
        assert axes.has_data()
        plt.close(axes.figure)

    def test_wrong_input_is_refused(self):
        """Each error names what is wrong."""
        refuses(self.refusals())

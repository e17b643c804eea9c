"""A method that acts on the whole model, in files: its folder, damaged ones, another process."""
# ruff: noqa: D102 (a test's name is its docstring)

from __future__ import annotations

import pytest
import torch
from torch import nn

import lowdim
from lowdim.adapters import LoRA
from lowdim.adapters.core.composed import is_composed
from lowdim.errors import CheckpointError
from lowdim.files import read_tensors
from lowdim.testing.closeness import relative_error
from lowdim.testing.new_process import run_in_new_process
from lowdim.testing.small_model import output_of_saved, sample_input, small_model
from lowdim.testing.whole_hooks import WholeHooks

__all__ = ["WholeFiles"]


class WholeFiles(WholeHooks):
    """A saved adapter gives the same model again, or is rejected with a clear error."""

    def test_another_process_loads_the_same_bits(self, tmp_path):
        model = small_model()
        adapted = self.adapt(model)
        adapted.save(tmp_path)
        file = run_in_new_process(output_of_saved, str(tmp_path), type(adapted.method).__module__)
        with torch.no_grad():
            assert torch.equal(read_tensors(file)[0]["y"], model(sample_input()))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_save_and_load_keep_dtype_state_and_training(self, tmp_path, dtype):
        model, twin, plain = (small_model(dtype=dtype) for _ in range(3))
        x = sample_input(dtype=dtype)
        adapted = self.adapt(model, seed=3)
        self.train(adapted, steps=2, dtype=dtype)
        adapted.save(tmp_path)
        loaded = lowdim.load_adapter(twin, tmp_path)
        assert loaded.method == adapted.method
        assert type(loaded) is type(adapted)
        state = adapted.state_dict()
        assert all(
            torch.equal(value, state[key]) and value.dtype == state[key].dtype for key, value in loaded.state_dict().items()
        )
        assert torch.equal(twin(x), model(x))
        assert relative_error(twin(x), self.wanted(plain, loaded, x)) <= 10 * self.tolerance[dtype]
        assert self.train(loaded, steps=2, dtype=dtype) == self.train(adapted, steps=2, dtype=dtype)

    def test_another_base_model_is_refused(self, tmp_path):
        adapted = self.adapt(small_model())
        adapted.save(tmp_path)
        other = small_model(seed=1)
        with pytest.raises(CheckpointError, match=r"parameter body\.first\.weight differs"):
            lowdim.load_adapter(other, tmp_path)
        untouched(other)
        with pytest.raises(CheckpointError, match=r"body\.first\.weight, which the model lacks"):
            lowdim.load_adapter(nn.Sequential(nn.Linear(2, 2)), tmp_path)
        odd = small_model()
        odd.body["first"] = nn.Linear(8, 13)
        with pytest.raises(CheckpointError, match=r"body\.first\.weight of shape \(12, 8\); the model's is \(13, 8\)"):
            lowdim.load_adapter(odd, tmp_path)
        loaded = lowdim.load_adapter(other, tmp_path, check_base=False)
        assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), adapted.state_dict().values(), strict=True))

    @pytest.mark.parametrize("file", ["adapter.safetensors", "adapter.json"])
    def test_damaged_files_are_refused(self, tmp_path, file):
        self.adapt(small_model()).save(tmp_path)
        data = (tmp_path / file).read_bytes()
        for cut in (0, len(data) // 2, len(data) - 2):
            (tmp_path / file).write_bytes(data[:cut])
            model = small_model()
            with pytest.raises(CheckpointError, match=file):
                lowdim.load_adapter(model, tmp_path)
            untouched(model)

    def test_a_file_on_an_adapted_model_is_refused(self, tmp_path):
        model = small_model()
        self.adapt(model).save(tmp_path / "mine")
        with pytest.raises(ValueError, match="already adapted"):
            lowdim.load_adapter(model, tmp_path / "mine")
        lowdim.adapt(small_model(), LoRA(rank=1)).save(tmp_path / "lora")
        with pytest.raises(CheckpointError, match="composed by another adapter"):
            lowdim.load_adapter(model, tmp_path / "lora")


def untouched(model: nn.Module) -> None:
    """Assert that a refused adapter has left nothing in the model."""
    assert not is_composed(model)
    assert all(p.requires_grad for p in model.parameters())
    assert not hasattr(model, "lowdim_shared")

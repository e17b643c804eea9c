"""An adapter in files: its own folder, PEFT's, damaged ones, another process."""
# ruff: noqa: D102 (a test's name is its docstring)

from __future__ import annotations

import copy
import json

import pytest
import torch

import lowdim
from lowdim.adapters import AdaptedLayer, Method
from lowdim.errors import CheckpointError
from lowdim.files import read_tensors
from lowdim.testing.adapter_hooks import AdapterHooks
from lowdim.testing.closeness import relative_error
from lowdim.testing.new_process import run_in_new_process
from lowdim.testing.small_model import output_of_saved, sample_input, small_model

__all__ = ["AdapterFiles"]


class AdapterFiles(AdapterHooks):
    """A saved adapter gives the same model again, or is rejected with a clear error."""

    def test_another_process_loads_the_same_bits(self, tmp_path):
        model = small_model()
        adapted = self.adapt(model)
        adapted.save(tmp_path)
        file = run_in_new_process(output_of_saved, str(tmp_path), type(self.method()).__module__)
        with torch.no_grad():
            assert torch.equal(read_tensors(file)[0]["y"], model(sample_input()))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_save_and_load_keep_dtype_state_and_training(self, tmp_path, dtype):
        model, twin = small_model(dtype=dtype), small_model(dtype=dtype)
        plain, x = small_model(dtype=dtype), sample_input(dtype=dtype)
        adapted = self.adapt(model)
        self.train(adapted, steps=2, dtype=dtype)
        adapted.save(tmp_path)
        loaded = lowdim.load_adapter(twin, tmp_path)
        assert loaded.method == adapted.method
        state = adapted.state_dict()
        assert all(
            torch.equal(value, state[key]) and value.dtype == state[key].dtype for key, value in loaded.state_dict().items()
        )
        assert torch.equal(twin(x), model(x))
        assert relative_error(twin(x), self.wanted_model(plain, loaded)(x.double())) <= 10 * self.forward_tolerance[dtype]
        assert self.train(loaded, steps=2, dtype=dtype) == self.train(adapted, steps=2, dtype=dtype)

    def test_another_base_model_is_refused(self, tmp_path):
        self.adapt(small_model()).save(tmp_path)
        other = small_model(seed=1)
        before = copy.deepcopy(other.state_dict())
        with pytest.raises(CheckpointError, match=r"body\.first differs"):
            lowdim.load_adapter(other, tmp_path)
        assert all(torch.equal(before[key], value) for key, value in other.state_dict().items())
        assert all(p.requires_grad for p in other.parameters())
        lowdim.load_adapter(other, tmp_path, check_base=False)

    # The last byte of the JSON is a newline, which nothing depends on.
    @pytest.mark.parametrize(("file", "lacking"), [("adapter.safetensors", 1), ("adapter.json", 2)])
    def test_damaged_files_are_refused(self, tmp_path, file, lacking):
        self.adapt(small_model()).save(tmp_path)
        data = (tmp_path / file).read_bytes()
        for cut in (0, len(data) // 2, len(data) - lacking):
            (tmp_path / file).write_bytes(data[:cut])
            model = small_model()
            with pytest.raises(CheckpointError, match=file):
                lowdim.load_adapter(model, tmp_path)
            assert not any(isinstance(m, AdaptedLayer) for m in model.modules())

    def test_the_configuration_goes_through_json(self):
        method = self.method()
        assert type(method).from_config(json.loads(json.dumps(method.config()))) == method
        assert isinstance(type(method)(), Method)  # every field has a default

    def test_peft_gives_the_same_logits(self, tmp_path):
        peft = pytest.importorskip("peft")
        model, plain, x = small_model(), small_model(), sample_input(64)
        adapted = self.adapt(model)
        report = adapted.export(tmp_path)
        assert report.exact == self.exact_in_peft
        if not self.exact_in_peft:
            assert 0 < max(report.errors.values()) <= 1
            report = adapted.export(tmp_path, rank=8)  # the largest that the layers can have
            assert max(report.errors.values()) <= 1e-3
        loaded = peft.PeftModel.from_pretrained(small_model(), tmp_path)
        assert relative_error(loaded(x), self.wanted_model(plain, adapted)(x.double())) <= 1e-5

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lowdim.diagnose import weights_of
from lowdim.errors import CheckpointError, DataError
from lowdim.testing.agreement import refuses
from lowdim.testing.diagnose_case import save_sharded


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.conv = nn.Conv2d(1, 2, 3)
        self.body = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 5, bias=False))
        self.body[2].weight = nn.Parameter(torch.randn(5, 3))
        self.register_buffer("kept", torch.ones(2, 2))
        self.register_buffer("dropped", torch.ones(2, 2), persistent=False)
        self.register_buffer("counts", torch.ones(2, 2, dtype=torch.int64))


class StandIn(nn.Module):
    """What lowdim's adapted layers offer: `.base` (here a residual), `.update`, `.merged()`."""

    def __init__(self, layer):
        super().__init__()
        self.before = layer.weight.detach().clone()
        self.base, self.update = nn.Linear(4, 3), nn.Linear(4, 3, bias=False)

    def merged(self):
        plain = nn.Linear(4, 3)
        plain.weight = nn.Parameter(self.base.weight.detach() + self.update.weight.detach())
        return plain


class Knows(StandIn):
    def original_weight(self):
        return self.before


def same(a, b):
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


def test_names_are_those_of_the_state_dict():
    model = Net()
    weights = weights_of(model)
    want = {k: v for k, v in model.state_dict().items() if v.ndim == 2 and v.is_floating_point()}
    assert sorted(weights) == sorted(want) == ["body.0.weight", "body.2.weight", "embed.weight", "kept"]
    assert all(torch.equal(weights[k], v) for k, v in want.items())
    assert all(weights.shape(k) == tuple(v.shape) for k, v in want.items())
    assert not weights["embed.weight"].requires_grad
    assert weights_of(weights) is weights


def test_tied_weights_have_both_names():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    assert list(weights_of(model)) == ["0.weight", "1.weight"]


def test_sources_agree(tmp_path):
    tensors = {k: v.contiguous() for k, v in Net().state_dict().items()}
    want = dict(weights_of(tensors))
    save_file(tensors, tmp_path / "model.safetensors")
    folder = save_sharded(tensors, tmp_path / "shards")
    other = tmp_path / "other"
    other.mkdir()
    save_file(tensors, other / "weights.safetensors")
    for path in (
        tmp_path,
        str(tmp_path / "model.safetensors"),
        folder,
        folder / "model.safetensors.index.json",
        other,
    ):
        got = weights_of(path)
        assert sorted(got) == sorted(want)
        assert all(torch.equal(got[k], want[k]) for k in want)


def test_nothing_is_loaded_before_it_is_asked_for(tmp_path, monkeypatch):
    from lowdim.diagnose.core import weights as module

    read = []

    class Spy:
        def __init__(self, *args):
            self.file = real(*args)

        def __getattr__(self, name):
            return getattr(self.file, name)

        def get_tensor(self, name):
            read.append(name)
            return self.file.get_tensor(name)

    real = module.safe_open
    monkeypatch.setattr(module, "safe_open", Spy)
    save_file({"a": torch.ones(2, 3), "b": torch.zeros(4, 4), "c": torch.zeros(4)}, tmp_path / "model.safetensors")
    weights = weights_of(tmp_path)
    assert dict.fromkeys(weights) == {"a": None, "b": None}
    assert "a" in weights
    assert weights.shape("a") == (2, 3)
    assert not read
    assert torch.equal(weights["a"], torch.ones(2, 3))
    assert read == ["a"]


def test_peft_model_gives_plain_names_and_merged_weights():
    peft = pytest.importorskip("peft", reason="adapters of PEFT are tested where it is installed")
    model = Net()
    before = {k: v.clone() for k, v in weights_of(model).items()}
    config = peft.LoraConfig(r=2, target_modules=["body.0", "embed"], modules_to_save=["body.2"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config)
    with torch.no_grad():
        wrapped.base_model.model.body[2].modules_to_save["default"].weight.add_(1.0)
    state = {k: v.clone() for k, v in wrapped.state_dict().items()}
    merged, frozen = weights_of(wrapped), weights_of(wrapped, merged=False)
    assert sorted(merged) == sorted(before)
    assert same(dict(sorted(frozen.items())), dict(sorted(before.items())))
    got = {k: v.clone() for k, v in merged.items()}
    assert all(torch.equal(v, state[k]) for k, v in wrapped.state_dict().items())  # merged in a copy
    assert torch.equal(got["body.2.weight"], before["body.2.weight"] + 1.0)
    with wrapped.disable_adapter():
        assert same(dict(weights_of(wrapped)), {k: before[k] for k in weights_of(wrapped)})
    plain = wrapped.merge_and_unload()
    for name, tensor in weights_of(plain).items():
        assert torch.allclose(got[name], tensor, atol=1e-6), name
    assert not torch.allclose(got["body.0.weight"], before["body.0.weight"], atol=1e-3)


def test_peft_adapter_that_was_merged_in_place():
    peft = pytest.importorskip("peft", reason="adapters of PEFT are tested where it is installed")
    wrapped = peft.get_peft_model(Net(), peft.LoraConfig(r=2, target_modules=["body.0"], init_lora_weights=False))
    want = weights_of(wrapped)["body.0.weight"].clone()
    wrapped.merge_adapter()
    assert torch.allclose(weights_of(wrapped)["body.0.weight"], want, atol=1e-6)


def test_lowdim_layers_are_merged():
    model = Net()
    old = model.body[0]
    model.body[0] = Knows(old)
    merged = weights_of(model)
    assert "body.0.weight" in merged
    assert not any("update" in name or "base" in name for name in merged)
    assert torch.equal(merged["body.0.weight"], model.body[0].merged().weight)
    assert torch.equal(weights_of(model, merged=False)["body.0.weight"], old.weight)
    model.body[0] = StandIn(old)
    with pytest.raises(TypeError, match=r"body\.0.*keep the base model"):
        weights_of(model, merged=False)


def test_an_adapted_model_of_lowdim():
    import lowdim
    from lowdim.adapters import LoRA

    model = Net()
    before = {k: v.clone() for k, v in weights_of(model).items()}
    adapted = lowdim.adapt(model, LoRA(rank=2, target_modules=["body.0"]))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(".B"):
                p.normal_()
    merged = {k: v.clone() for k, v in weights_of(model).items()}
    assert sorted(merged) == sorted(before)
    assert same(dict(weights_of(model, merged=False)), {k: before[k] for k in merged})
    assert not torch.equal(merged["body.0.weight"], before["body.0.weight"])
    plain = adapted.merge()
    assert all(torch.equal(merged[k], v) for k, v in weights_of(plain).items())


def test_conv1d_is_turned_in_modules_folders_and_bare_files_next_to_a_module(tmp_path):
    conv1d = pytest.importorskip("transformers.pytorch_utils", reason="Conv1D is transformers'").Conv1D
    block = nn.ModuleDict({"c_fc": conv1d(6, 4), "lin": nn.Linear(3, 2)})
    weights = weights_of(block)
    assert weights.shape("c_fc.weight") == (6, 4)
    assert torch.equal(weights["c_fc.weight"], block["c_fc"].weight.T)
    save_file(block.state_dict(), tmp_path / "model.safetensors")
    assert weights_of(tmp_path).shape("c_fc.weight") == (4, 6)
    aligned = weights_of(tmp_path).oriented_like(weights)
    assert same(dict(aligned), {k: weights[k] for k in aligned})
    assert aligned.shape("c_fc.weight") == (6, 4)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    assert weights_of(tmp_path).shape("c_fc.weight") == (6, 4)
    assert torch.equal(weights_of(tmp_path)["c_fc.weight"], weights["c_fc.weight"])


def test_sharded_tensors_are_gathered():
    class Sharded(torch.Tensor):  # as much of a DTensor as is asked for
        def full_tensor(self):
            return torch.full(self.shape, 7.0)

    weights = weights_of({"w": torch.zeros(2, 3).as_subclass(Sharded)})
    assert torch.equal(weights["w"], torch.full((2, 3), 7.0))


def test_wrong_sources_are_refused(tmp_path):
    def folder(name, **files):
        path = tmp_path / name
        path.mkdir()
        for file, text in files.items():
            (path / file.replace("__", ".")).write_text(text)
        return path

    empty = folder("empty")
    adapter = folder("adapter", adapter_config__json="{}")
    broken = folder("broken", model__safetensors="not a file of weights")
    index = folder("index", model__safetensors__index__json='{"weight_map": {"a": "gone.safetensors"}}')
    damaged = folder("damaged", model__safetensors__index__json="[1, 2")
    pickled = folder("pickled", model__bin="x")
    config = folder("config", config__json="[]")
    save_file({"w": torch.ones(2, 2)}, config / "model.safetensors")
    refuses(
        [
            (ValueError, "2-D", lambda: weights_of(torch.ones(3))),
            (TypeError, "int", lambda: weights_of(3)),
            (DataError, "does not exist", lambda: weights_of(tmp_path / "nowhere")),
            (DataError, "pickled", lambda: weights_of(pickled / "model.bin")),
            (DataError, "no safetensors file", lambda: weights_of(empty)),
            (DataError, "adapter", lambda: weights_of(adapter)),
            (CheckpointError, "damaged", lambda: weights_of(broken)),
            (CheckpointError, "gone.safetensors", lambda: weights_of(index)),
            (CheckpointError, "index of shards", lambda: weights_of(damaged)),
            (CheckpointError, "config.json", lambda: weights_of(config)),
            (ValueError, "nearest: body.0.weight", lambda: weights_of(Net())["body.0.wieght"]),
        ]
    )

"""LoRAM: the shared case with and without a ratio, and the authors' numbers."""

import copy

import pytest
import torch
from torch import nn

import lowdim
import vectors
from lowdim.adapters import ChannelGroup, LoRAM, gqa_channels, recover_lora, select_channels
from lowdim.adapters.loram.channels import channel_scores
from lowdim.files import read_tensors
from lowdim.surgery import weight_matrix
from lowdim.testing.adapter_case import AdapterCase
from lowdim.testing.closeness import relative_error
from lowdim.testing.new_process import run_in_new_process
from lowdim.testing.sample_layers import make_input, make_layer, moved_output
from lowdim.testing.small_model import output_of_saved, sample_input, small_model


class TestLoRAM(AdapterCase):
    rank, alpha = 2, 5

    def method(self, **changes):
        return LoRAM(**{"rank": self.rank, "alpha": self.alpha, "dropout": 0.0, **changes})

    def dense(self, update):
        return self.alpha / self.rank * update.B @ update.A

    def start(self, weight, stats):
        return {"B": 0.0}

    def max_delta_rank(self, out_features, in_features):
        return 2


class TestLoRAMByRatio(TestLoRAM):
    # The layer is the whole model's in evaluation mode only: there it starts unchanged and merges to what it computes.
    ratio = 0.4

    def method(self, **changes):
        return super().method(**{"ratio": self.ratio, **changes})

    def pruned(self, weight):
        """The smallest magnitudes, zero elsewhere."""
        count = round(self.ratio * weight.numel())
        smallest = weight.abs().flatten().argsort()[:count]
        return torch.zeros_like(weight).flatten().index_copy(0, smallest, weight.flatten()[smallest]).view_as(weight)

    def start(self, weight, stats):
        return {"B": 0.0, "pruned": self.pruned(weight)}

    def taken(self, weight, stats):
        return self.pruned(weight)

    def attach(self, layer, **kwargs):
        return super().attach(layer, **kwargs).eval()

    def adapt(self, model, **kwargs):
        return super().adapt(model.eval(), **kwargs)

    def test_training_leaves_the_pruned_weights_out(self, layer_name):
        layer = make_layer(layer_name)
        adapted = self.attach(layer).train()
        x = make_input(layer)
        small = self.change(adapted) - self.pruned(weight_matrix(layer).detach())
        assert relative_error(adapted(x), moved_output(layer, small, x)) <= 1e-12

    def test_another_process_loads_the_same_bits(self, tmp_path):  # the other process answers in training mode
        model = small_model()
        self.adapt(model).save(tmp_path)
        file = run_in_new_process(output_of_saved, str(tmp_path), LoRAM.__module__)
        assert torch.equal(read_tensors(file)[0]["y"], model.train()(sample_input()))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_save_and_load_keep_dtype_state_and_training(self, tmp_path, dtype):  # the shared one loads in training mode
        model, twin = small_model(dtype=dtype), small_model(dtype=dtype)
        adapted = self.adapt(model)
        self.train(adapted, steps=2, dtype=dtype)
        adapted.save(tmp_path)
        loaded = lowdim.load_adapter(twin, tmp_path)
        assert loaded.method == adapted.method
        for mode in (True, False):
            assert torch.equal(twin.train(mode)(sample_input(dtype=dtype)), model.train(mode)(sample_input(dtype=dtype)))
        assert self.train(loaded, steps=2, dtype=dtype) == self.train(adapted, steps=2, dtype=dtype)


def test_vectors_recover():
    case = vectors.load("loram", "recover")
    full, rank, kept = case.hyperparameters["full"], case.hyperparameters["rank"], case["kept"]
    A, _ = recover_lora(case["down_A"], torch.zeros(5, rank), full, 5, kept_in=kept)
    assert torch.equal(A, case["down_A_R"])
    for name in ("gate", "up"):
        _, B = recover_lora(torch.zeros(rank, 5), case[f"{name}_B"], 5, full, kept_out=kept)
        assert torch.equal(B, case[f"{name}_B_R"])
    assert sorted([*kept.tolist(), *case["pruned_idx"].tolist()]) == list(range(full))


def test_vectors_gqa():
    case = vectors.load("loram", "gqa")
    kv, qo = gqa_channels(case["kept_kv_heads"], **case.hyperparameters)
    assert torch.equal(kv, case["kv"])
    assert torch.equal(qo, case["qo"])
    names = "qkvo"
    model = nn.ModuleDict({n: _linear(case[f"W_{n}"]) for n in names})
    small = LoRAM(rank=1, groups=[ChannelGroup(["k", "v"], [], kv), ChannelGroup(["q"], ["o"], qo)]).shrink(model)
    for n in names:
        assert torch.equal(small[n].weight, case[f"P_{n}"])
        assert torch.equal(model[n].weight, case[f"W_{n}"])
        assert (small[n].out_features, small[n].in_features) == case[f"P_{n}"].shape


def test_vectors_pipeline():
    case = vectors.load("loram", "pipeline")
    how = case.hyperparameters
    large = nn.Sequential(_linear(case["W1"], case["b1"]), nn.ReLU(), _linear(case["W2"], case["b2"]))
    before = copy.deepcopy(large.state_dict())
    method = LoRAM(how["rank"], how["alpha"], dropout=0.0, groups=[ChannelGroup(["0"], ["2"], case["kept"])])
    small = method.shrink(large)
    adapted = lowdim.adapt(small, method)
    with torch.no_grad():
        for name, number in (("0", 1), ("2", 2)):
            update = adapted.layers[name].update
            update.A.copy_(case[f"A{number}"])
            update.B.copy_(case[f"B{number}"])
    case.close(small(case["x"]), "small_out")
    case.close(adapted.recover(large)(case["x"]), "large_out")
    assert all(torch.equal(large.state_dict()[key], value) for key, value in before.items())
    data = {"batches": [(case["x"], case["target"])], "loss_fn": lambda m, b: (m(b[0]) - b[1]).square().mean()}
    for criterion in ("magnitude", "taylor"):
        given = data if criterion == "taylor" else {}
        case.close(channel_scores(large, ["0"], ["2"], criterion, **given), f"scores_{criterion}")
        kept = select_channels(large, ["0"], ["2"], how["ratio"], criterion, **given)
        assert torch.equal(kept, case[f"kept_{criterion}"])


def _linear(weight, bias=None):
    layer = nn.Linear(weight.shape[1], len(weight), bias is not None, dtype=torch.float64)
    layer.weight.data = weight.clone()
    if bias is not None:
        layer.bias.data = bias.clone()
    return layer

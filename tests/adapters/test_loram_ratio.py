"""LoRAM by ratio: training sees the pruned weight and evaluation the whole one; which weights go; files and comparisons."""

import torch
from torch import nn

import lowdim
import tiny
from lowdim import methods
from lowdim.adapters import LoRAM
from lowdim.catalogue import variant
from lowdim.files import read_tensors
from lowdim.surgery import weight_matrix
from lowdim.testing.closeness import relative_error
from lowdim.testing.sample_layers import make_layer
from lowdim.testing.small_model import sample_input, small_model


def test_by_ratio_training_sees_the_pruned_weight_and_evaluation_the_whole():
    layer = make_layer("linear", torch.float32)
    adapted = LoRAM(rank=2, dropout=0.0, ratio=0.4).attach(layer)
    weight = layer.weight.detach()
    gone = torch.zeros(weight.numel(), dtype=torch.bool)
    gone[weight.abs().flatten().argsort(stable=True)[: round(0.4 * weight.numel())]] = True
    masked = weight.masked_fill(gone.view(weight.shape), 0.0)
    assert torch.equal(weight_matrix(adapted.base), masked)
    x = torch.randn(4, 12)
    assert relative_error(adapted.train()(x), torch.nn.functional.linear(x, masked, layer.bias)) < 1e-6
    assert relative_error(adapted.eval()(x), layer(x)) < 1e-6
    assert torch.equal(adapted.original_weight(), weight)
    with torch.no_grad():
        adapted.update.B.normal_()
    want = weight + 8.0 * adapted.update.B @ adapted.update.A
    for mode in (True, False):
        adapted.train(mode)
        assert relative_error(adapted.effective_weight(), want) < 1e-6
        assert relative_error(adapted.merged().weight, want) < 1e-6
        assert relative_error(adapted.delta(), want - weight) < 1e-5


def test_by_ratio_the_same_weights_go_as_in_a_shrunk_copy():
    model, method = small_model(), LoRAM(rank=2, ratio=0.3)
    small = method.shrink(model)
    adapted = lowdim.adapt(small_model(), method)
    for name, layer in adapted.layers.items():
        assert torch.equal(layer.base.weight, small.get_submodule(name).weight)
    assert torch.equal(small.score.weight, model.score.weight)
    again = lowdim.adapt(small, method)  # prunes what is zero already
    assert not any(bool(layer.update.pruned.any()) for layer in again.layers.values())


def test_by_ratio_equal_magnitudes_go_by_index():
    layer = nn.Linear(4, 2, bias=False)
    layer.weight.data = torch.tensor([[1.0, -1.0, 2.0, 1.0], [1.0, 0.5, 1.0, -1.0]])
    adapted = LoRAM(rank=1, ratio=0.5).attach(layer)
    assert adapted.base.weight.tolist() == [[0.0, 0.0, 2.0, 0.0], [1.0, 0.0, 1.0, -1.0]]


def test_by_ratio_a_checkpoint_holds_the_factors_only(tmp_path):
    adapted = lowdim.adapt(small_model(dtype=torch.bfloat16), LoRAM(rank=2, ratio=0.5), dtype=torch.float32)
    assert {layer.update.pruned.dtype for layer in adapted.layers.values()} == {torch.bfloat16}
    adapted.save(tmp_path)
    assert {key.rpartition(".")[2] for key in read_tensors(tmp_path / "adapter.safetensors")[0]} == {"A", "B"}
    twin = lowdim.load_adapter(small_model(dtype=torch.bfloat16), tmp_path)
    x = sample_input(dtype=torch.bfloat16)
    for mode in (True, False):
        for one in (adapted, twin):
            one.model.train(mode)
            for layer in one.layers.values():
                layer.dropout = 0.0
        assert torch.equal(twin.model(x), adapted.model(x))


def test_by_ratio_in_a_comparison():
    model, ids = tiny.llama(), torch.arange(12).view(2, 6)
    bare = model.eval()(input_ids=ids).logits
    applied = methods.apply(variant("loram"), model, lr=1e-3, steps=2)
    assert applied.adapted.method.ratio > 0
    assert relative_error(applied.model.eval()(input_ids=ids).logits, bare) < 1e-5
    assert relative_error(applied.model.train()(input_ids=ids).logits, bare) > 1e-2

import copy

import pytest
import torch
from adapter_vectors import train
from torch import nn
from torch.nn import functional as F

import lowdim
import vectors
from lowdim.adapters import FLoRA
from lowdim.linalg import tucker_reconstruct
from lowdim.plan.kept import kept_tensors
from lowdim.testing.adapter_case import AdapterCase
from lowdim.testing.closeness import relative_error
from lowdim.testing.sample_layers import moved_output
from lowdim.testing.small_model import small_model

CONVOLUTIONS = {
    "conv1d": lambda: nn.Conv1d(4, 6, 5, stride=2, padding=3, dilation=2),
    "conv1d_circular": lambda: nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular"),
    "conv2d_odd": lambda: nn.Conv2d(4, 5, (3, 2), stride=(1, 2), padding=(2, 0), dilation=(1, 3)),
    "conv2d_same": lambda: nn.Conv2d(4, 6, 3, padding="same", bias=False),
    "conv3d": lambda: nn.Conv3d(4, 6, (2, 3, 2), stride=(1, 2, 1), padding=(0, 1, 1)),
    "conv3d_1x1x1": lambda: nn.Conv3d(4, 6, 1),
    "conv3d_grouped": lambda: nn.Conv3d(4, 6, 2, groups=2),
}


def build(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(3)
    layer = CONVOLUTIONS[name]().to(dtype)
    x = torch.randn(2, 4, *(8, 9, 7)[: layer.weight.ndim - 2], dtype=torch.float64)
    return layer, x.to(dtype)


class TestFLoRA(AdapterCase):
    lr = 0.01
    scale = 3.0

    def method(self, **changes):
        rank = changes.pop("rank", self.rank)
        return FLoRA(**{"ranks": rank, "scale": self.scale, "dropout": 0.0, **changes})

    def dense(self, update):
        """`ΔW[o, i, h, …] = scale · Σ G[a, b, c, …] U₀[i, a] U₁[o, b] U₂[h, c] …`, kernel axes flattened."""
        axes = ("ab,ia,ob->oi", "abc,ia,ob,hc->oih", "abce,ia,ob,hc,we->oihw", "abcef,ia,ob,hc,we,df->oihwd")
        return self.scale * torch.einsum(axes[update.G.ndim - 2], update.G, *update.U).flatten(1)

    def start(self, weight, stats):
        return {"G": 0.0}

    def max_delta_rank(self, out_features, in_features):
        return 2

    @pytest.mark.parametrize("name", CONVOLUTIONS)
    def test_convolutions_of_any_number_of_axes(self, name):
        layer, x = build(name)
        before = layer(x)
        adapted = self.attach(layer, disturbed=False)
        assert relative_error(adapted(x), before) <= 1e-12
        self.disturb(adapted.update)
        assert relative_error(adapted(x), self.wanted(layer, adapted, x)) <= 1e-12
        assert relative_error(adapted(x[0]), adapted(x)[0]) <= 1e-12
        assert relative_error(adapted.merged()(x), adapted(x)) <= 1e-12
        trained = [p for p in adapted.parameters() if p.requires_grad]
        target = torch.randn(before.shape, dtype=torch.float64)
        got, want = (
            torch.autograd.grad((y * target).sum(), [*trained, x])
            for y in (adapted(x.requires_grad_()), moved_output(layer, self.dense(adapted.update), x))
        )
        assert all(relative_error(a, b) <= 1e-11 for a, b in zip(got, want, strict=True))
        A, B = adapted.update.low_rank_delta()
        assert A.shape[0] == 2
        assert relative_error(B @ A, self.change(adapted)) <= 1e-12

    @pytest.mark.parametrize("name", ["conv1d", "conv3d"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_convolutions_in_low_precision_and_from_a_file(self, name, dtype, tmp_path):
        layer, x = build(name, dtype)
        model, twin = nn.Sequential(copy.deepcopy(layer)), nn.Sequential(copy.deepcopy(layer))
        adapted = self.adapt(model)
        assert relative_error(model(x), self.wanted(layer, adapted.layers["0"], x)) <= self.forward_tolerance[dtype]
        adapted.save(tmp_path)
        lowdim.load_adapter(twin, tmp_path)
        assert torch.equal(twin(x), model(x))
        plain = adapted.merge()[0]
        assert type(plain) is type(layer)
        assert plain.weight.dtype == dtype


def attach(case):
    how = case.hyperparameters
    out, n = case["W0"].shape[:2]
    if how["kind"] == "linear":
        layer = nn.Linear(n, out, dtype=torch.float64)
    else:
        cls = {"conv2d": nn.Conv2d, "conv3d": nn.Conv3d}[how["kind"]]
        layer = cls(n, out, how["kernel"], how["stride"], how["padding"], dtype=torch.float64)
    layer.load_state_dict({"weight": case["W0"], "bias": case["b"]})
    adapted = FLoRA(ranks=how["ranks"], scale=how["scale"], dropout=how["dropout"]).attach(layer)
    adapted.update.load_state_dict({"G": case["G"], **{f"U.{i}": case[f"U{i}"] for i in range(len(how["ranks"]))}})
    return adapted


@pytest.mark.parametrize("name", vectors.cases("flora"))
def test_vectors(name):
    case = vectors.load("flora", name)
    adapted = attach(case)
    update = adapted.update
    case.close(adapted.delta().view(case["delta"].shape), "delta")
    if "y" in case:
        y = adapted(case["x"])
        case.close(y, "y")
        (y.square().sum() / 2).backward()
        case.close(update.G.grad, "grad_G")
        for i, factor in enumerate(update.U):
            case.close(factor.grad, f"grad_U{i}")
    if "G_end" in case:
        case.tolerance = 1e-8  # the metadata's for the steps; the first number there is that of one evaluation
        case.hyperparameters["optimizer"] = "Adam"  # the metadata adds torch's own defaults and the loss in words
        train(case, adapted, case.hyperparameters["steps"], lambda step: None)
        case.close(update.G, "G_end")
        for i, factor in enumerate(update.U):
            case.close(factor, f"U{i}_end")
        case.close(adapted.delta().view(case["delta_end"].shape), "delta_end")


def test_every_tensor_of_the_vectors_is_looked_at():
    seen = {"delta", "y", "grad_G", "G_end", "delta_end", "W0", "b", "G", "x", "target"}
    seen |= {f"{a}U{i}{b}" for a, b in [("", ""), ("grad_", ""), ("", "_end")] for i in range(5)}
    assert all(set(vectors.load("flora", name).tensors) <= seen for name in vectors.cases("flora"))


def test_the_order_of_the_core_is_in_out_kernel():
    update = FLoRA(ranks=(2, 3, 1, 2), scale=2.0).attach(nn.Conv2d(5, 7, (3, 4))).update
    assert update.G.shape == (2, 3, 1, 2)
    assert [tuple(factor.shape) for factor in update.U] == [(5, 2), (7, 3), (3, 1), (4, 2)]
    nn.init.normal_(update.G)
    want = 2.0 * torch.einsum("abce,ia,ob,hc,we->oihw", update.G, *update.U)
    assert relative_error(update.dense().view(7, 5, 3, 4), want) < 1e-6
    assert relative_error(tucker_reconstruct(update.G, list(update.U)), want.transpose(0, 1) / 2.0) < 1e-6


def test_conv1d_of_transformers_is_a_linear_layer():
    from transformers.pytorch_utils import Conv1D

    update = FLoRA(ranks=(2, 3)).attach(Conv1D(7, 5)).update
    assert [tuple(factor.shape) for factor in update.U] == [(5, 2), (7, 3)]
    assert update.dense().shape == (7, 5)


def test_one_number_means_two_for_each_kernel_axis_at_most():
    assert FLoRA().attach(nn.Linear(8, 9)).update.ranks == (8, 8)
    assert FLoRA(ranks=3).attach(nn.Conv2d(4, 5, (3, 1))).update.ranks == (3, 3, 2, 1)
    assert FLoRA(ranks=3).attach(nn.Conv1d(4, 5, 7)).update.ranks == (3, 3, 2)
    assert FLoRA(ranks=1).attach(nn.Conv3d(4, 4, 2, groups=4)).update.ranks == (1, 1, 2, 2, 2)


def test_the_start_has_kaiming_factors_and_an_empty_core():
    update = FLoRA(ranks=(8, 4)).attach(nn.Linear(4000, 3000), generator=torch.Generator().manual_seed(0)).update
    assert not update.G.any()
    for factor, rank in zip(update.U, (8, 4)):
        assert abs(float(factor.detach().std()) / (0.5 / rank) ** 0.5 - 1) < 0.02


def test_only_the_core_moves_first():
    adapted = FLoRA(ranks=2, dropout=0.0).attach(nn.Conv2d(3, 4, 3))
    adapted(torch.randn(2, 3, 6, 6)).square().sum().backward()
    assert adapted.update.G.grad.any()
    assert all(not factor.grad.any() for factor in adapted.update.U)


def test_dropout_is_on_the_updates_input_only():
    layer = nn.Conv2d(3, 4, 3)
    adapted = FLoRA(ranks=2, dropout=0.5).attach(layer).train()
    nn.init.normal_(adapted.update.G)
    x = torch.randn(2, 3, 6, 6)
    torch.manual_seed(1)
    got = adapted(x)
    torch.manual_seed(1)
    want = layer(x) + F.conv2d(F.dropout(x, 0.5), adapted.delta().view(layer.weight.shape))
    assert relative_error(got, want) < 1e-5


def test_nothing_of_the_size_of_the_weight_is_built():
    for layer, x in [(nn.Linear(96, 80), torch.randn(3, 96)), (nn.Conv2d(64, 48, 3, padding=1), torch.randn(1, 64, 3, 3))]:
        adapted = FLoRA(ranks=2, dropout=0.0).attach(layer)
        kept = kept_tensors(lambda a=adapted, x=x: a(x), adapted)
        assert max(t.numel() for t in kept) < layer.weight.numel() / 8


def test_a_linear_layer_keeps_one_thin_product_for_each_row():
    adapted = FLoRA(ranks=(4, 6), dropout=0.0).attach(nn.Linear(32, 24))
    x = torch.randn(1000, 32)
    rows = [t for t in kept_tensors(lambda: adapted(x), adapted) if t.shape[0] == 1000]
    assert sorted(t.shape[1] for t in rows) == [4, 32]


def test_exact_factors_of_low_precision_updates_are_multiplied_in_float32():
    update = FLoRA(ranks=3).attach(nn.Conv2d(8, 9, 3), dtype=torch.bfloat16).update
    nn.init.normal_(update.G)
    A, B = update.low_rank_delta()
    assert A.dtype == torch.float32
    assert relative_error(B @ A, copy.deepcopy(update).double().dense()) < 1e-6


PEFT_TAKES = [nn.Linear(4, 7), *(conv(4, 6, 3, padding=1) for conv in (nn.Conv1d, nn.Conv2d, nn.Conv3d))]


@pytest.mark.parametrize("layer", PEFT_TAKES, ids=lambda layer: type(layer).__name__)
def test_peft_takes_the_factors_exactly(tmp_path, layer):
    peft = pytest.importorskip("peft")
    kernel = layer.weight.ndim - 2
    x = torch.randn(2, 4, *[5] * kernel)
    model, twin = nn.Sequential(copy.deepcopy(layer)), nn.Sequential(layer)
    adapted = lowdim.adapt(model, FLoRA(ranks=(2, 3, *(2, 1, 2)[:kernel])))
    nn.init.normal_(adapted.layers["0"].update.G)
    report = adapted.export(tmp_path)
    assert report.exact
    assert report.ranks == {"0": 3 if kernel else 2}
    assert relative_error(peft.PeftModel.from_pretrained(twin, tmp_path)(x), model.eval()(x)) < 1e-5


def test_all_linear_takes_convolutions_of_any_kind():
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.Conv3d(2, 4, 3), nn.Linear(4, 4), nn.LayerNorm(4))
    assert list(lowdim.adapt(model, FLoRA(ranks=2)).layers) == ["0", "1", "2"]


def test_bad_input():
    for bad, match in [((2,), "at least two"), ((2, 0), r"ranks\[1\]"), ((2, True), r"ranks\[1\]"), ("8", "ranks")]:
        with pytest.raises(ValueError, match=match):
            FLoRA(ranks=bad)
    for bad in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="scale"):
            FLoRA(scale=bad)
    with pytest.raises(ValueError, match=r"layer body\.first .*ranks must have 2 entries \(in, out\).*\(2, 2, 2\)"):
        lowdim.adapt(small_model(), FLoRA(ranks=(2, 2, 2)))
    with pytest.raises(ValueError, match="ranks must have 4 entries"):
        FLoRA(ranks=(2, 2)).attach(nn.Conv2d(4, 4, 3))
    conv = nn.Conv2d(4, 5, (2, 3))
    for ranks, axis in [((5, 2, 1, 1), "'in'"), ((2, 6, 1, 1), "'out'"), ((2, 2, 3, 1), "axis 0"), ((2, 2, 1, 4), "axis 1")]:
        with pytest.raises(ValueError, match=axis):
            FLoRA(ranks=ranks).attach(conv)
    with pytest.raises(ValueError, match=r"'in'.*\[1, 1\]; got 8"):  # a depthwise kernel has one channel
        FLoRA().attach(nn.Conv2d(8, 8, 3, groups=8))
    for layer in (nn.Embedding(4, 3), nn.ConvTranspose2d(2, 2, 3)):
        with pytest.raises(TypeError, match=type(layer).__name__):
            FLoRA(ranks=1).attach(layer)

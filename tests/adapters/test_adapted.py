import copy
import dataclasses
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import lowdim
from lowdim.adapters import AdaptedLayer, LaMDA, LoRA, LoRASB, LoRAXS, Method, SVFit, registered_methods
from lowdim.adapters.core.fingerprints import digest_weight
from lowdim.adapters.core.low_rank import LoRAUpdate
from lowdim.errors import CheckpointError, NoMatchingModuleError
from lowdim.plan.kept import kept_tensors
from lowdim.testing.closeness import relative_error
from lowdim.testing.sample_layers import make_layer
from lowdim.testing.small_model import sample_input, small_model


def _disturb(adapted):
    with torch.no_grad():
        for parameter in adapted.trainable().values():
            parameter.add_(0.3 * torch.randn_like(parameter))


# adapt


def test_targets_and_freezing():
    model = small_model()
    adapted = lowdim.adapt(model, LoRA(rank=1, target_modules=["second"]))
    assert adapted.model is model
    assert list(adapted.layers) == ["body.second"]
    assert isinstance(model.body["second"], AdaptedLayer)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {"body.second.update.A", "body.second.update.B"}
    assert list(lowdim.adapt(small_model(), LoRA(rank=1)).layers) == ["body.first", "body.second"]  # not the head
    assert "LoRA" in repr(adapted)
    assert "trained=18" in repr(adapted)


def test_modules_to_save_are_trained_and_written():
    adapted = lowdim.adapt(small_model(), LoRA(rank=1), modules_to_save=["score"])
    assert adapted.modules_to_save == ("score",)
    assert {"score.weight", "score.bias"} <= set(adapted.trainable())
    assert {"score.weight", "score.bias"} <= set(adapted.state_dict())
    with pytest.raises(NoMatchingModuleError, match="'scores' matches no module; nearest names: score"):
        lowdim.adapt(small_model(), LoRA(rank=1), modules_to_save=["scores"])
    with pytest.raises(ValueError, match=r"'body' holds the adapted layer body\.first"):
        lowdim.adapt(small_model(), LoRA(rank=1), modules_to_save=["body"])


@pytest.mark.parametrize(
    "fail",
    [
        lambda model: lowdim.adapt(model, LoRAXS(rank=7)),  # fits the first layer, not the second
        lambda model: lowdim.adapt(model, LoRA(rank=1, target_modules=["nothing"])),
        lambda model: lowdim.adapt(model, LoRASB(rank=1)),
        lambda model: lowdim.adapt(model, LoRA(rank=1), modules_to_save=["nothing"]),
    ],
)
def test_a_failure_leaves_the_model_as_it_was(fail):
    model = small_model()
    model.score.weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError):
        fail(model)
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["score.weight"]
    assert not any(isinstance(m, AdaptedLayer) for m in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_not_a_method():
    with pytest.raises(TypeError, match=r"LoRA\(rank=8\); got 'lora'"):
        lowdim.adapt(small_model(), "lora")
    with pytest.raises(TypeError, match="got <class"):
        lowdim.adapt(small_model(), LoRA)


def test_starts_do_not_depend_on_the_order_of_layers():
    whole = lowdim.adapt(small_model(), LoRA(rank=1)).layers["body.second"].update.A
    alone = lowdim.adapt(small_model(), LoRA(rank=1, target_modules=["second"])).layers["body.second"].update.A
    assert torch.equal(whole, alone)
    first = lowdim.adapt(small_model(), LoRA(rank=1)).layers["body.first"].update.A
    assert not torch.equal(first[:, :8], whole[:, :8])


def test_global_random_state_is_left_alone():
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    lowdim.adapt(small_model(), LoRA(rank=1))
    assert torch.equal(torch.rand(3), want)


def test_adapting_works_without_autograd():
    def loss(model, batch):
        return model(batch).square().mean()

    here = lowdim.adapt(small_model(), LoRASB(rank=1), batches=[sample_input()], loss_fn=loss)
    with torch.no_grad():
        there = lowdim.adapt(small_model(), LoRASB(rank=1), batches=[sample_input()], loss_fn=loss)
    assert any(bool(layer.delta().any()) for layer in there.layers.values())
    assert all(torch.equal(layer.delta(), here.layers[name].delta()) for name, layer in there.layers.items())


def test_a_shared_module_is_adapted_once_and_everywhere():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.Tanh(), shared)
    adapted = lowdim.adapt(model, LoRA(rank=1))
    assert list(adapted.layers) == ["0"]
    assert model[0] is model[2]
    _disturb(adapted)
    x = torch.randn(2, 4)
    want = model(x)
    adapted.merge()
    assert model[0] is model[2]
    torch.testing.assert_close(model(x), want)


def test_transformer_layers_do_not_bypass_the_update():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), 2)
    adapted = lowdim.adapt(encoder, SVFit(rank=3))
    assert list(adapted.layers) == [f"layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)]
    _disturb(adapted)
    encoder.eval()
    x, padding = torch.randn(2, 5, 8), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    want = encoder(x), encoder(x, src_key_padding_mask=padding)
    with torch.no_grad():
        torch.testing.assert_close(encoder(x), want[0])
        torch.testing.assert_close(encoder(x, src_key_padding_mask=padding)[1, :3], want[1][1, :3])
        adapted.merge()
        torch.testing.assert_close(encoder(x), want[0])
    assert encoder.use_nested_tensor
    assert encoder.layers[0].activation_relu_or_gelu


def test_quantised_and_computed_weights_are_refused():
    layer = nn.Linear(4, 4).requires_grad_(False)
    layer.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match="floating point"):
        LoRA(rank=1).attach(layer)
    with pytest.raises(TypeError, match=r"layer 0 .*computed"):
        lowdim.adapt(nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))), LoRA(rank=1))


# Adapted


def test_a_parameter_that_a_schedule_froze_stays_in_the_groups():
    adapted = lowdim.adapt(small_model(), LaMDA(rank=2, total_steps=1, target_modules=["first"]))
    names = list(adapted.trainable())
    adapted.step()
    assert not adapted.layers["body.first"].update.B.requires_grad
    assert list(adapted.trainable()) == names
    assert sum(len(group["params"]) for group in adapted.param_groups(0.1)) == 2


def test_param_groups_carry_rate_and_decay():
    adapted = lowdim.adapt(small_model(), LoRA(rank=1), modules_to_save=["score"])
    (group,) = adapted.param_groups(0.3, weight_decay=0.1)
    assert group["lr"] == 0.3
    assert group["weight_decay"] == 0.1
    assert len(group["params"]) == 6
    assert "weight_decay" not in adapted.param_groups(0.3)[0]


def test_check_reports_norms_and_warns_of_what_learnt_nothing():
    adapted = lowdim.adapt(small_model(), LoRA(rank=1))
    with pytest.warns(UserWarning, match=r"ΔW is zero in 2 of 2 adapted layers: body\.first, body\.second"):
        assert adapted.check() == {"body.first": 0.0, "body.second": 0.0}
    _disturb(adapted)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        norms = adapted.check()
    for name, layer in adapted.layers.items():
        assert norms[name] == pytest.approx(float(layer.delta().norm()), rel=1e-5)


def test_regularizer_sums_over_layers():
    adapted = lowdim.adapt(small_model(), LoRA(rank=1))
    assert adapted.regularizer() == 0.0
    for i, layer in enumerate(adapted.layers.values()):
        layer.update.regularizer = lambda i=i: torch.tensor(float(i + 1))
    assert float(adapted.regularizer()) == 3.0


def test_merge_reports_what_it_changed():
    model = small_model(dtype=torch.bfloat16)
    adapted = lowdim.adapt(model, LoRA(rank=1))
    _disturb(adapted)
    deltas = {name: layer.delta() for name, layer in adapted.layers.items()}
    weights = {name: layer.weight.detach().float() for name, layer in adapted.layers.items()}
    adapted.merge()
    report = adapted.merge_report
    assert [change.layer for change in report.layers] == list(deltas)
    for change in report.layers:
        delta, weight = deltas[change.layer], weights[change.layer]
        assert change.relative_change == pytest.approx(float(delta.norm() / weight.norm()), rel=1e-5)
        assert change.largest_change == pytest.approx(float(delta.abs().max()), rel=1e-4)
        exact = weight + delta
        assert change.rounding_error == pytest.approx(float((exact.bfloat16().float() - exact).abs().max()), rel=1e-3)
        assert 0 < change.rounding_error < 2**-8 * float(exact.abs().max())
    assert "body.first" in str(report)
    assert report.to_dict()["untied"] == []
    assert all(p.requires_grad for p in model.parameters())
    assert type(model.body["first"]) is nn.Linear


def test_merging_rounds_once():
    """Products in bfloat16 would add their own rounding to that of the weight."""
    layer = make_layer("linear", torch.bfloat16)
    adapted = LoRA(rank=3).attach(layer)
    with torch.no_grad():
        adapted.update.B.normal_()
    A, B = adapted.update.A.detach().double(), adapted.update.B.detach().double()
    exact = layer.weight.detach().double() + adapted.update.scaling * B @ A
    assert torch.equal(adapted.merged().weight, exact.bfloat16())
    assert adapted.delta().dtype == torch.float32


def test_the_original_weight_comes_back_from_a_residual():
    layer = make_layer("linear")
    adapted = LaMDA(rank=4).attach(layer)
    assert adapted.rebased
    assert not torch.equal(adapted.weight, layer.weight)
    assert relative_error(adapted.original_weight(), layer.weight) < 1e-14
    plain = LoRA(rank=1).attach(layer)
    assert not plain.rebased
    assert plain.original_weight() is plain.weight is layer.weight


def test_an_adapted_layer_looks_like_its_base():
    layer = make_layer("conv1d")
    adapted = LoRA(rank=1).attach(layer.eval())
    assert adapted.weight is layer.weight
    assert adapted.bias is layer.bias
    assert (adapted.out_features, adapted.in_features) == (9, 12)
    assert not adapted.training


# Convolutions


@pytest.mark.parametrize(
    "options",
    [
        {"stride": 2},
        {"padding": 1, "dilation": 2},
        {"padding": (0, 1), "stride": (1, 2)},
        {"padding": "same", "dilation": 2},
        {"padding": 1, "padding_mode": "reflect"},
        {"groups": 4},
        {"kernel_size": 1, "stride": 2},
        {"kernel_size": 1, "padding": 1},
        {"kernel_size": (1, 3)},
    ],
    ids=str,
)
@pytest.mark.parametrize("method", [LoRA(rank=2), lowdim.adapters.RandLoRA(rank=2)], ids=["thin", "patches"])
def test_convolutions_of_every_kind(options, method):
    conv = nn.Conv2d(4, 8, **{"kernel_size": 3, **options}, dtype=torch.float64)
    adapted = method.attach(conv)
    with torch.no_grad():
        for parameter in adapted.update.parameters():
            parameter.normal_()
    for shape in [(2, 4, 7, 6), (4, 7, 6)]:
        x = torch.randn(shape, dtype=torch.float64)
        assert relative_error(adapted(x), adapted.merged()(x)) < 1e-12


def test_a_convolution_never_makes_patches_of_a_thin_update():
    adapted = LoRA(rank=2).attach(nn.Conv2d(4, 8, 3, padding=1))
    x = torch.randn(1, 4, 20, 20)
    assert max(t.numel() for t in kept_tensors(lambda: adapted(x))) == x.numel()


# Methods


def test_a_methods_name_is_its_own():
    methods = registered_methods()
    assert methods["LoRA"] is LoRA
    with pytest.raises(TypeError, match="already registered by lowdim"):
        type("LoRA", (Method,), {"__module__": "elsewhere"})
    assert registered_methods()["LoRA"] is LoRA


def test_configuration_of_another_version_is_refused():
    with pytest.raises(CheckpointError, match="LoRA has no field colour; its fields are alpha"):
        LoRA.from_config({"rank": 2, "colour": "red"})
    method = LoRA(rank=2, target_modules=["a", "b"])
    assert LoRA.from_config(method.config()) == method


@dataclasses.dataclass(frozen=True)
class Doubled(Method):
    """A third party's method, in as few lines as the interface asks for."""

    dropout: float = 0.0
    target_modules: Any = None

    def blank(self, out_features, in_features, *, stats, dtype, device):
        return LoRAUpdate(out_features, in_features, 1, stats.get("factor", 2.0), dtype=dtype, device=device)

    def initialise(self, update, weight, stats, generator):
        update.A.copy_(weight[:1])

    def prepare(self, layers, *, seed, initialise=True):
        return {name: {"factor": float(len(layers))} for name in layers}


def test_what_a_method_prepares_reaches_each_layer():
    adapted = lowdim.adapt(small_model(), Doubled())
    assert {layer.update.scaling for layer in adapted.layers.values()} == {2.0}
    assert LoRA(rank=1).param_groups({"a": nn.Parameter(torch.ones(1))}, 0.5)[0]["lr"] == 0.5


def test_a_method_without_its_two_parts_says_so():
    class Empty(Method):
        target_modules = None

    with pytest.raises(NotImplementedError, match="Empty must define blank"):
        Empty().attach(nn.Linear(2, 2))


# Fingerprints


def test_fingerprints_survive_bfloat16_and_see_single_columns():
    torch.manual_seed(0)
    weight = torch.randn(300, 512).bfloat16().float()
    assert digest_weight(weight) == digest_weight(weight.bfloat16())
    assert digest_weight(weight) == digest_weight(nn.Parameter(weight.T.contiguous().T))
    assert digest_weight(weight) != digest_weight(weight.T)
    seen = 0
    for column in range(0, 512, 37):
        other = weight.clone()
        other[:, column] += 1
        seen += digest_weight(other) != digest_weight(weight)
    assert seen == len(range(0, 512, 37))

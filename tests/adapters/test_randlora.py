import copy
import math

import pytest
import torch
from adapter_vectors import layer_of, train
from torch import nn

import lowdim
import vectors
from lowdim.adapters import AdaptedLayer, RandLoRA
from lowdim.plan.kept import kept_tensors
from lowdim.testing.adapter_case import AdapterCase
from lowdim.testing.closeness import relative_error
from lowdim.testing.sample_layers import make_layer
from lowdim.testing.small_model import sample_input, small_model


class TestRandLoRA(AdapterCase):
    random_start = False  # the bases come from the method's own seed, and the rest starts constant
    has_factors = False  # the update has full rank
    rank, alpha = 2, 5

    def method(self, **changes):
        return RandLoRA(**{"rank": self.rank, "alpha": self.alpha, **changes})

    def dense(self, update):
        """`c · Σ_kj B♭[:, k·n + j] ⊗ (lam[k, j] · A[k] ⊙ gamma[j])`, transposed where in > out; `B♭` runs over (j, k)."""
        ranks, terms = update.lam.shape
        flat = update.B.flatten(1)
        total = sum(
            torch.outer(flat[:, k * terms + j], update.lam[k, j] * update.A[k] * update.gamma[j])
            for k in range(ranks)
            for j in range(terms)
        )
        wide = update.in_features > update.out_features
        return self.alpha / self.rank / math.sqrt(terms) * (total.T if wide else total)

    def start(self, weight, stats):
        return {"lam": 0.0, "gamma": 1 / max(math.ceil(min(weight.shape) / self.rank), min(weight.shape))}


@pytest.mark.parametrize("name", vectors.cases("randlora"))
def test_vectors(name):
    case = vectors.load("randlora", name)
    how = case.hyperparameters
    adapted = RandLoRA(rank=how["rank"], alpha=how["alpha"], sqrt_scaling=how["sqrt_scaling"]).attach(layer_of(case))
    update = adapted.update
    assert not adapted.delta().any()
    with torch.no_grad():
        for key, tensor in [("A", update.A), ("B", update.B), ("lam0", update.lam), ("gamma0", update.gamma)]:
            tensor.copy_(case[key])
    case.close(adapted(case["x"]), "y0")
    case.close(adapted.delta(), "delta0")

    def check(step):
        if step == 0:
            case.close(update.lam.grad, "grad_lam")
            case.close(update.gamma.grad, "grad_gamma")
        case.close(adapted.delta(), case["delta_steps"][step])

    train(case, adapted, how["steps"], check)
    assert int(torch.linalg.matrix_rank(adapted.delta())) == int(case["delta_rank"])


def test_numbers_and_start():
    adapted = RandLoRA(rank=4).attach(nn.Linear(10, 30))
    update = adapted.update
    assert update.lam.shape == (4, 3)
    assert update.gamma.shape == (3, 10)
    assert not update.lam.any()
    assert torch.equal(update.gamma, torch.full((3, 10), 1 / 10))
    assert RandLoRA(rank=2, alpha=4).attach(nn.Linear(6, 6)).update.scaling == 4 / 2 / math.sqrt(3)
    assert RandLoRA(rank=2, alpha=4, sqrt_scaling=False).attach(nn.Linear(6, 6)).update.scaling == 2
    assert torch.equal(RandLoRA(rank=1).attach(nn.Linear(2, 2)).update.gamma, torch.full((2, 2), 0.5))


def test_one_pair_of_bases_serves_the_model_and_survives_moves():
    model = small_model()
    adapted = lowdim.adapt(model, RandLoRA(rank=2))

    def storages(model):
        updates = [module.update for module in model.modules() if isinstance(module, AdaptedLayer)]
        return [{getattr(u, name).untyped_storage().data_ptr() for u in updates} for name in "AB"]

    assert [len(s) for s in storages(model)] == [1, 1]
    first = adapted.layers["body.first"].update
    assert first.A.shape == (2, 8)
    assert first.B.shape == (12, 4, 2)
    assert adapted.layers["body.second"].update.B.shape == (12, 3, 2)
    before = first.A.clone()
    model.double()
    assert [len(s) for s in storages(model)] == [1, 1]
    assert torch.equal(first.A, before.double())
    twin = copy.deepcopy(model)
    assert [len(s) for s in storages(twin)] == [1, 1]
    assert storages(twin) != storages(model)
    assert model(sample_input(dtype=torch.float64)).dtype == torch.float64


def test_bases_are_never_saved_and_come_back_from_the_seed(tmp_path):
    model = small_model()
    adapted = lowdim.adapt(model, RandLoRA(rank=2, seed=5))
    assert {key.rsplit(".", 1)[1] for key in adapted.state_dict()} == {"lam", "gamma"}
    assert not any(key.endswith((".A", ".B")) for key in model.state_dict())
    adapted.save(tmp_path)
    loaded = lowdim.load_adapter(small_model(), tmp_path)
    for name, layer in loaded.layers.items():
        assert torch.equal(layer.update.A, adapted.layers[name].update.A)
        assert torch.equal(layer.update.B, adapted.layers[name].update.B)
    other = RandLoRA(rank=2, seed=6).attach(nn.Linear(8, 12)).update
    assert not torch.equal(other.A, RandLoRA(rank=2, seed=5).attach(nn.Linear(8, 12)).update.A)


def test_leaving_the_meta_device_draws_the_bases():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(6, 8))
    adapted = lowdim.adapt(model, RandLoRA(rank=2), initialise=False)
    model.to_empty(device="cpu")
    want = RandLoRA(rank=2).attach(nn.Linear(6, 8)).update
    assert torch.equal(adapted.layers["0"].update.A, want.A)
    assert torch.equal(adapted.layers["0"].update.B, want.B)


@pytest.mark.parametrize(("base", "share"), [("sparse", 2 / 3), ("very_sparse", 1 - 1 / math.sqrt(256))])
def test_sparse_bases_have_their_probabilities(base, share):
    update = RandLoRA(rank=64, base=base).attach(nn.Linear(256, 256)).update
    for tensor in (update.A, update.B):
        values = tensor.unique()
        assert len(values) == 3
        assert values[1] == 0
        count = tensor.numel()
        spread = math.sqrt(share * (1 - share) / count)
        assert abs(float((tensor == 0).float().mean()) - share) < 5 * spread
        assert abs(float((tensor > 0).float().mean()) - (1 - share) / 2) < 5 * spread
        assert abs(float(tensor.double().std()) - 1) < 1e-5


def test_uniform_bases_have_unit_deviation():
    update = RandLoRA(rank=64).attach(nn.Linear(256, 256)).update
    for tensor in (update.A, update.B):
        assert abs(float(tensor.double().std()) - 1) < 1e-6
        assert abs(float(tensor.abs().max()) - math.sqrt(3)) < 0.02


def test_bfloat16_bases_are_the_float32_ones_rounded():
    wide = RandLoRA(rank=2).attach(nn.Linear(8, 8)).update
    half = RandLoRA(rank=2).attach(nn.Linear(8, 8, dtype=torch.bfloat16)).update
    assert torch.equal(half.A, wide.A.bfloat16())


def test_full_rank_after_training():
    adapted = RandLoRA(rank=3).attach(nn.Linear(14, 10, dtype=torch.float64))
    with torch.no_grad():
        adapted.update.lam.normal_()
        assert int(torch.linalg.matrix_rank(adapted.delta())) == 3  # gamma is still constant
        adapted.update.gamma.normal_()
    assert int(torch.linalg.matrix_rank(adapted.delta())) == 10


@pytest.mark.parametrize("name", ["linear", "tall"])
def test_the_backward_pass_does_not_keep_the_scaled_factor(name):
    layer = make_layer(name)
    adapted = RandLoRA(rank=2).attach(layer)
    x = torch.randn(1, layer.in_features, dtype=torch.float64, requires_grad=True)
    fresh = kept_tensors(lambda: adapted(x), adapted)
    # for this one row x itself, or B♭ᵀx, and the scaled lam; A♭ would be n·rank times d
    assert sum(t.numel() for t in fresh) <= 12 + adapted.update.lam.numel()


def test_a_layer_larger_than_the_shared_bases_is_refused():
    method = RandLoRA(rank=2)
    stats = method.prepare({"a": nn.Linear(6, 8)}, seed=0)["a"]
    method.attach(nn.Linear(5, 8), stats=stats)
    with pytest.raises(ValueError, match=r"\(n, d, D\) = \(3, 6, 8\); this layer needs at least \(2, 4, 9\)"):
        method.attach(nn.Linear(4, 9), stats=stats)


def test_bad_input():
    with pytest.raises(ValueError, match=r"base must be one of.*uniform"):
        RandLoRA(base="gaussian")
    with pytest.raises(ValueError, match="rank"):
        RandLoRA(rank=0)
    with pytest.raises(ValueError, match="seed"):
        RandLoRA(seed=-1)
    with pytest.raises(ValueError, match="alpha"):
        RandLoRA(alpha=0)
    with pytest.raises(ValueError, match="at most min"):
        RandLoRA(rank=5).attach(nn.Linear(4, 9))


def _shapes() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 24), nn.Tanh(), nn.Linear(24, 7), nn.Tanh(), nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 3))


@pytest.mark.parametrize("sqrt_scaling", [True, False])
def test_peft_native_export_is_exact_for_layers_of_different_shape(tmp_path, sqrt_scaling):
    peft = pytest.importorskip("peft")
    model = _shapes()
    adapted = lowdim.adapt(model, RandLoRA(rank=3, alpha=9, sqrt_scaling=sqrt_scaling, target_modules=["0", "2", "4"]))
    with torch.no_grad():
        for parameter in adapted.trainable().values():
            parameter.add_(torch.randn(parameter.shape))
    report = adapted.export(tmp_path)
    assert report.exact
    loaded = peft.PeftModel.from_pretrained(_shapes(), tmp_path)
    assert next(iter(loaded.peft_config.values())).peft_type == "RANDLORA"
    x = torch.randn(50, 10)
    assert relative_error(loaded(x), model(x)) < 1e-5
    theirs = dict(loaded.base_model.model.named_modules())
    for name, layer in adapted.layers.items():
        assert relative_error(theirs[name].get_delta_weight("default"), layer.delta()) < 1e-6


def test_peft_export_of_transformers_conv1d(tmp_path):
    peft = pytest.importorskip("peft")
    make = lambda: nn.Sequential(make_layer("conv1d", torch.float32))  # noqa: E731
    model = make()
    adapted = lowdim.adapt(model, RandLoRA(rank=3, alpha=9, target_modules=["0"]))
    with torch.no_grad():
        adapted.layers["0"].update.lam.normal_()
    adapted.export(tmp_path)
    loaded = peft.PeftModel.from_pretrained(make(), tmp_path)
    x = torch.randn(6, 12)
    assert relative_error(loaded(x), model(x)) < 1e-5


def test_a_convolution_goes_to_peft_as_truncated_lora(tmp_path):
    model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1))
    adapted = lowdim.adapt(model, RandLoRA(rank=2))
    with torch.no_grad():
        adapted.layers["0"].update.lam.normal_()
        adapted.layers["0"].update.gamma.normal_()
    report = adapted.export(tmp_path, rank=3)
    assert not report.exact
    assert report.ranks == {"0": 3}
    assert 0 < report.errors["0"] < 1
    s = torch.linalg.svdvals(adapted.layers["0"].delta()).square()
    assert report.suggested_rank == next(r for r in range(1, 9) if s[r:].sum() <= 1e-4 * s.sum())

import json
import warnings

import pytest
import torch
from adapter_starts import leading
from adapter_vectors import layer_of, train
from torch import nn

import lowdim
import vectors
from lowdim.adapters import SVFit
from lowdim.errors import CheckpointError
from lowdim.files import read_tensors
from lowdim.plan.kept import kept_tensors
from lowdim.surgery import weight_matrix
from lowdim.testing.adapter_case import AdapterCase
from lowdim.testing.closeness import relative_error
from lowdim.testing.sample_layers import make_layer
from lowdim.testing.small_model import sample_input, small_model


class TestSVFit(AdapterCase):
    random_start = False  # everything follows from the weight
    lr = 0.05
    rank = 3

    def method(self, **changes):
        return SVFit(**{"rank": self.rank, **changes})

    def dense(self, update):
        return update.U @ torch.diag(update.s - update.s0) @ update.Vh

    def start(self, weight, stats):
        U, sigma, Vh = leading(weight, self.rank)
        return {"U": U, "s": sigma, "s0": sigma, "Vh": Vh}

    def taken(self, weight, stats):
        U, sigma, Vh = leading(weight, self.rank)
        return U @ torch.diag(sigma) @ Vh

    def max_delta_rank(self, out_features, in_features):
        return 3


@pytest.mark.parametrize("name", vectors.cases("svfit"))
def test_vectors(name):
    case = vectors.load("svfit", name)
    how = case.hyperparameters
    adapted = SVFit(rank=how["rank"], energy=how["energy"]).attach(layer_of(case))
    update = adapted.update
    assert update.rank == int(case["chosen_rank"])
    case.close(update.s, "s0")
    case.close(weight_matrix(adapted.base), "base_weight", scale=float(case["W"].abs().max()))
    case.close(adapted(case["x"]), "y0")

    def check(step):
        if step == 0:
            case.close(update.s.grad, "grad_s_step1")
        case.close(update.s, case["s_steps"][step])
        case.close(adapted.delta(), case["delta_steps"][step])

    train(case, adapted, how["steps"], check)
    case.close(adapted(case["x"]), "y_end")


def test_the_energy_chooses_the_fewest():
    layer = nn.Linear(4, 4, bias=False)
    layer.weight.data = torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.1]))
    for energy, rank in [(0.6, 1), (0.65, 2), (0.92, 2), (0.95, 3), (1.0, 4)]:
        assert SVFit(energy=energy).attach(layer).update.rank == rank


def test_full_rank_keeps_its_residual_and_the_start_exact():
    layer = make_layer("linear", torch.float32)
    adapted = SVFit(rank=9).attach(layer)
    assert float(adapted.base.weight.abs().max()) < 1e-6
    restored = adapted.original_weight()
    assert torch.equal(restored, layer.weight)


def test_values_may_cross_zero_and_lose_their_order():
    adapted = SVFit(rank=4).attach(make_layer("linear"))
    with torch.no_grad():
        adapted.update.s.copy_(torch.tensor([-1.0, 5.0, 0.0, 2.0]))
    x = torch.randn(3, 12, dtype=torch.float64)
    assert relative_error(adapted.merged()(x), adapted(x)) < 1e-12


def test_the_backward_pass_keeps_the_thin_product_only():
    adapted = SVFit(rank=2).attach(make_layer("linear"))
    x = torch.randn(40, 12, dtype=torch.float64)
    assert max(t.numel() for t in kept_tensors(lambda: adapted(x))) == 40 * 2


def test_a_checkpoint_holds_only_s(tmp_path):
    model = small_model()
    adapted = lowdim.adapt(model, SVFit(energy=0.9))
    adapted.save(tmp_path)
    tensors, _ = read_tensors(tmp_path / "adapter.safetensors")
    assert set(tensors) == {"body.first.update.s", "body.second.update.s"}
    about = json.loads((tmp_path / "adapter.json").read_text())
    ranks = {name: entry["meta"]["rank"] for name, entry in about["layers"].items()}
    assert ranks == {name: layer.update.rank for name, layer in adapted.layers.items()}
    assert all(len(entry["fingerprint"].split(":")[0]) == 24 for entry in about["layers"].values())


def _degenerate() -> nn.Sequential:
    layer = nn.Linear(5, 5, bias=False)
    layer.weight.data = torch.eye(5) * torch.tensor([2.0, 2.0, 1.0, 0.5, 0.25])
    return nn.Sequential(layer)


def test_equal_singular_values_are_stored_with_their_vectors(tmp_path):
    adapted = lowdim.adapt(_degenerate(), SVFit(rank=2))
    with torch.no_grad():
        turn = torch.linalg.qr(torch.randn(2, 2)).Q  # what another LAPACK might have answered
        update = adapted.layers["0"].update
        update.U.copy_(update.U @ turn)
        update.Vh.copy_(turn.T @ update.Vh)
        update.s += torch.tensor([0.5, -1.0])
    adapted.save(tmp_path)
    twin = _degenerate()
    loaded = lowdim.load_adapter(twin, tmp_path)
    x = torch.randn(3, 5)
    assert relative_error(twin(x), adapted.model(x)) < 1e-6
    loaded.save(tmp_path / "again")
    assert set(read_tensors(tmp_path / "again/adapter.safetensors")[0]) == {f"0.update.{key}" for key in ("s", "s0", "U", "Vh")}


def test_a_cut_between_equal_values_and_a_rank_deficient_weight_are_degenerate_too(tmp_path):
    assert not SVFit(rank=1).attach(_degenerate()[0]).update.unique
    assert SVFit(rank=4).attach(nn.Linear(6, 4)).update.unique
    thin = nn.Linear(6, 4, bias=False)
    thin.weight.data = torch.outer(torch.arange(1.0, 5.0), torch.arange(1.0, 7.0))
    assert SVFit(rank=1).attach(thin).update.unique
    assert not SVFit(rank=2).attach(thin).update.unique


def test_a_file_with_another_rank_is_refused(tmp_path):
    update = SVFit(rank=2).attach(nn.Linear(4, 4)).update
    with pytest.raises(CheckpointError, match=r"s has shape \(3,\)"):
        update.restore({"s": torch.ones(3)}, torch.randn(4, 4))
    with pytest.raises(CheckpointError, match="missing"):
        update.restore({"s": torch.ones(2), "U": torch.ones(4, 2)}, torch.randn(4, 4))


def test_a_few_values_of_a_large_weight_come_from_a_sketch_that_is_stored(tmp_path):
    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(560, 530))

    model = build()
    x = torch.randn(3, 560)
    want = model(x)
    adapted = lowdim.adapt(model, SVFit(rank=4))
    assert relative_error(model(x), want) < 1e-5
    with torch.no_grad():
        adapted.layers["0"].update.s *= 1.5
    adapted.save(tmp_path)
    assert len(read_tensors(tmp_path / "adapter.safetensors")[0]) == 4
    twin = build()
    lowdim.load_adapter(twin, tmp_path)
    assert torch.equal(twin(x), model(x))


def test_weight_decay_on_s_is_refused_with_a_warning():
    adapted = lowdim.adapt(small_model(), SVFit(rank=2), modules_to_save=["score"])
    with pytest.warns(UserWarning, match="weight_decay=0.1 is not applied to SVFit"):
        groups = adapted.param_groups(0.01, weight_decay=0.1)
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert decay[id(adapted.layers["body.first"].update.s)] == 0
    assert decay[id(adapted.model.score.weight)] == 0.1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapted.param_groups(0.01)


def test_half_precision_weights_are_decomposed_exactly():
    model = small_model(dtype=torch.bfloat16)
    weight = model.body.first.weight.detach().double()
    adapted = lowdim.adapt(model, SVFit(rank=6), dtype=torch.float32)
    got = adapted.layers["body.first"].update.s0.double()
    assert relative_error(got, torch.linalg.svdvals(weight)[:6]) < 1e-7
    assert model(sample_input(dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_bad_input():
    for bad in (0.0, -0.1, 1.1, float("nan"), None):
        with pytest.raises(ValueError, match="energy"):
            SVFit(energy=bad)
    with pytest.raises(ValueError, match="rank"):
        SVFit(rank=0)
    layer = nn.Linear(4, 3)
    with pytest.raises(ValueError, match="at most min"):
        SVFit(rank=4).attach(layer)
    layer.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layer 0.*NaN"):
        lowdim.adapt(nn.Sequential(layer), SVFit(rank=1))
    with pytest.raises(TypeError):
        SVFit(rank=1).attach(nn.Embedding(4, 3))

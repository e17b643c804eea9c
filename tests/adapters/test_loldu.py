import math
import warnings

import pytest
import torch
from adapter_vectors import layer_of, train
from torch import nn

import lowdim
import vectors
from lowdim.adapters import LoLDU
from lowdim.errors import CheckpointError
from lowdim.files import read_tensors
from lowdim.linalg import ldu
from lowdim.plan.kept import kept_tensors
from lowdim.surgery import weight_matrix
from lowdim.testing.adapter_case import AdapterCase
from lowdim.testing.closeness import relative_error
from lowdim.testing.sample_layers import make_layer
from lowdim.testing.small_model import sample_input, small_model

INITS = ["ldu", "constant", "uniform", "normal", "ones", "zeros", "s_uniform", "s_normal"]
DRAWN = ["uniform", "normal", "s_uniform", "s_normal"]


class TestLoLDU(AdapterCase):
    rank, alpha = 3, 4.0
    random_start = False  # everything follows from the weight
    lr = 0.05

    def method(self, **changes):
        return LoLDU(**{"rank": self.rank, "alpha": self.alpha, **changes})

    def dense(self, update):
        return self.alpha / self.rank * update.L @ torch.diag(update.z - update.z0) @ update.U

    def factors(self, weight):
        """The first columns of `P L`, the pivots, and the first rows of the unit upper factor: `W = P L diag(d) U`."""
        P, L, upper = torch.linalg.lu(weight)
        d = upper.diagonal()
        return (P @ L)[:, : self.rank], d[: self.rank], (upper[: len(d)] / d[:, None])[: self.rank]

    def start(self, weight, stats):
        L, d, U = self.factors(weight)
        return {"L": L, "z": d, "z0": d, "U": U}

    def taken(self, weight, stats):
        L, d, U = self.factors(weight)
        return self.alpha / self.rank * L @ torch.diag(d) @ U

    def max_delta_rank(self, out_features, in_features):
        return 3


@pytest.mark.slow
class TestLoLDUDrawn(TestLoLDU):
    random_start = True

    def method(self, **changes):
        return super().method(**{"init": "normal", "train_scale": True, **changes})

    def dense(self, update):
        z = update.scale * update.z - self.alpha / self.rank * update.z0
        return update.L @ torch.diag(z) @ update.U

    def start(self, weight, stats):
        L, _, U = self.factors(weight)
        return {"L": L, "U": U, "scale": self.alpha / self.rank}

    def test_what_the_base_keeps(self, layer_name):  # the start is drawn
        layer = make_layer(layer_name)
        adapted = self.attach(layer, disturbed=False)
        L, _, U = self.factors(weight_matrix(layer))
        assert torch.equal(adapted.update.z, adapted.update.z0)
        kept = weight_matrix(layer) - self.alpha / self.rank * L @ torch.diag(adapted.update.z0) @ U
        assert relative_error(weight_matrix(adapted.base), kept) <= 1e-10


@pytest.mark.parametrize("name", vectors.cases("loldu"))
def test_vectors(name):
    case = vectors.load("loldu", name)
    how = case.hyperparameters
    adapted = LoLDU(rank=how["rank"], alpha=how["alpha"], init=how["init"]).attach(layer_of(case))
    update = adapted.update
    case.close(update.scale, "scale")
    for got, want in ((update.L, "L"), (update.U, "U"), (update.z0, "z0"), (update.z, "z0")):
        assert relative_error(got, case[want]) <= 1e-9, want
    case.close(weight_matrix(adapted.base), "base_weight", scale=float(case["W"].abs().max()))
    case.close(adapted(case["x"]), "y0")

    def check(step):
        case.close(update.z, case["z_steps"][step])
        case.close(adapted.delta(), case["delta_steps"][step])

    train(case, adapted, how["steps"], check)
    case.close(adapted(case["x"]), "y_end")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("init", INITS)
def test_every_start_leaves_the_output_as_it_is(init, dtype):
    """The authors' code subtracts `d` whatever the start."""
    layer = make_layer("linear", dtype)
    x = torch.randn(20, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    adapted = LoLDU(rank=5, alpha=2.0, init=init, train_scale=True).attach(layer, generator=torch.Generator().manual_seed(1))
    assert relative_error(adapted(x), layer(x)) <= {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 3e-2}[dtype]
    assert not adapted.delta().any()
    assert adapted.delta_norm() == 0


def test_the_starts():
    layer = make_layer("linear")
    _, _, d, _ = ldu(layer.weight)
    d = d[:6]
    mean, spread = float(d.mean()), float(d.std())

    def start(init, seed=0, rank=6):
        return LoLDU(rank=rank, init=init).attach(layer, generator=torch.Generator().manual_seed(seed)).update.z0

    assert relative_error(start("ldu"), d) < 1e-12
    assert relative_error(start("constant"), torch.full((6,), mean)) < 1e-6
    assert start("ones").unique().tolist() == [1.0]
    assert start("zeros").unique().tolist() == [0.0]
    drawn = {init: torch.stack([start(init, seed) for seed in range(60)]) for init in DRAWN}
    assert 0.9 * abs(mean) / 2 < float(drawn["uniform"].abs().max()) <= abs(mean) / 2
    assert 0.9 < float(drawn["s_uniform"].abs().max()) <= 1
    assert abs(float(drawn["s_normal"].mean())) < 0.15
    assert abs(float(drawn["s_normal"].std()) - 1) < 0.1
    assert abs(float(drawn["normal"].mean()) - mean) < 0.15 * spread
    assert abs(float(drawn["normal"].std()) / spread - 1) < 0.1
    assert math.isclose(float(start("normal", rank=1)), float(d[0]), rel_tol=1e-12)  # the deviation of one number is no number


def test_full_rank_leaves_nothing_in_the_base():
    adapted = LoLDU(rank=9, alpha=9.0).attach(make_layer("linear"))
    assert float(adapted.base.weight.abs().max()) < 1e-14
    assert relative_error(adapted.effective_weight(), make_layer("linear").weight) < 1e-14


def test_only_thin_factors_are_stored():
    adapted = LoLDU(rank=64).attach(nn.Linear(384, 384))
    tensors = [*adapted.update.parameters(), *adapted.update.buffers()]
    assert sum(t.numel() for t in tensors if t.ndim == 2) == 64 * (384 + 384)
    assert sum(t.numel() for t in tensors if t.ndim < 2) <= 3 * 64 + 1


def test_the_backward_pass_keeps_the_thin_product_only():
    adapted = LoLDU(rank=2).attach(make_layer("linear"))
    x = torch.randn(40, 12, dtype=torch.float64)
    assert max(t.numel() for t in kept_tensors(lambda: adapted(x))) == 40 * 2


def test_the_scale_is_trained_if_asked_for():
    layer, x = make_layer("linear"), torch.randn(6, 12, dtype=torch.float64)
    fixed = LoLDU(rank=2, alpha=3.0).attach(layer)
    assert fixed.update.scale.shape == ()
    assert [name for name, _ in fixed.update.named_parameters()] == ["z"]
    free = LoLDU(rank=2, alpha=3.0, train_scale=True).attach(layer)
    assert free.update.scale.shape == (1,)
    assert free.update.scale.item() == 1.5
    with torch.no_grad():
        free.update.scale.mul_(2)
        fixed.update.z.mul_(2)
    assert relative_error(free(x), fixed(x)) < 1e-12
    assert relative_error(free.delta(), fixed.delta()) < 1e-12
    free(x).square().sum().backward()
    assert float(free.update.scale.grad) != 0


@pytest.mark.parametrize("rows", ["one twice", "all alike", "none"])
def test_a_weight_of_lower_rank(rows, tmp_path):
    def build():
        torch.manual_seed(0)
        layer = nn.Linear(7, 6, dtype=torch.float64)
        with torch.no_grad():
            if rows == "one twice":
                layer.weight[1] = layer.weight[0]
            else:
                layer.weight.copy_(layer.weight[:1].expand(6, 7) if rows == "all alike" else torch.zeros(6, 7))
        return nn.Sequential(layer)

    model, x = build(), torch.randn(9, 7, dtype=torch.float64)
    want = model(x)
    adapted = lowdim.adapt(model, LoLDU(rank=6))
    update = adapted.layers["0"].update
    assert all(bool(t.isfinite().all()) for t in update.state_dict().values())
    assert relative_error(model(x), want) < 1e-12
    assert not update.unique  # what follows a pivot that is rounding differs by machine
    with torch.no_grad():
        update.z.add_(0.1)
    adapted.save(tmp_path)
    twin = build()
    loaded = lowdim.load_adapter(twin, tmp_path)
    assert torch.equal(twin(x), model(x))
    loaded.save(tmp_path / "again")
    assert "0.update.L" in read_tensors(tmp_path / "again/adapter.safetensors")[0]


@pytest.mark.parametrize("init", INITS)
def test_a_checkpoint_holds_the_diagonal_and_the_pivots(tmp_path, init):
    adapted = lowdim.adapt(small_model(), LoLDU(rank=4, init=init))
    with torch.no_grad():
        for layer in adapted.layers.values():
            layer.update.z.mul_(1.5).add_(0.1)
    adapted.save(tmp_path)
    tensors, _ = read_tensors(tmp_path / "adapter.safetensors")
    assert {name.rpartition(".")[2] for name in tensors} == {"z", "pivots", *(["z0"] if init in DRAWN else [])}
    twin = small_model()
    lowdim.load_adapter(twin, tmp_path)
    assert torch.equal(twin(sample_input()), adapted.model(sample_input()))


def test_tied_pivots_are_found_again():
    """A GPU may choose another of them; the file says which it was."""
    layer = nn.Linear(2, 3, bias=False)
    layer.weight.data = torch.tensor([[1.0, 2.0], [-1.0, 3.0], [1.0, 0.5]])
    update = LoLDU(rank=2, alpha=2.0).attach(layer).update
    for pivots in ([0, 2], [1, 2], [2, 1]):
        update.restore({"z": torch.tensor([1.0, 2.0]), "pivots": torch.tensor(pivots)}, layer.weight)
        product = update.L * update.z0 @ update.U
        assert relative_error(product, layer.weight) < 1e-6
        assert update.L[pivots[0]].tolist() == [1.0, 0.0]
        assert update.z.tolist() == [1.0, 2.0]


def test_loaded_over_a_weight_that_another_adapter_has_rounded(tmp_path):
    """Two rows that rounding makes equal: elimination anew would take the other one and silently give another ΔW."""

    def build():
        model = small_model()
        with torch.no_grad():
            weight = model.body["first"].weight
            weight[7, 0] = 1.1 * weight[:, 0].abs().max()
            weight[3, 0] = weight[7, 0] * (1 - 2**-20)
        return model

    one = lowdim.adapt(build(), LoLDU(rank=3))
    with torch.no_grad():
        one.layers["body.first"].update.z.mul_(1.5)
    one.save(tmp_path)
    twin = build()
    other = lowdim.adapt(twin, LoLDU(rank=4, alpha=400.0, init="ones"))
    rounded = other.layers["body.first"].pristine_weight()
    assert ldu(rounded)[0][0] != one.layers["body.first"].update.pivots[0]
    again = lowdim.load_adapter(twin, tmp_path, check_base=False)  # so much rounding shows in its digest
    assert relative_error(again.layers["body.first"].delta(), one.layers["body.first"].delta()) < 1e-3


def test_a_file_that_does_not_fit_is_refused():
    update = LoLDU(rank=2).attach(nn.Linear(4, 4)).update
    with pytest.raises(CheckpointError, match=r"z has shape \(3,\)"):
        update.restore({"z": torch.ones(3), "pivots": torch.tensor([0, 1])}, torch.randn(4, 4))
    with pytest.raises(CheckpointError, match="missing"):
        update.restore({"z": torch.ones(2)}, torch.randn(4, 4))


def test_weight_decay_is_refused_with_a_warning():
    adapted = lowdim.adapt(small_model(), LoLDU(rank=2, train_scale=True))
    with pytest.warns(UserWarning, match="weight_decay=0.1 is not applied to LoLDU"):
        groups = adapted.param_groups(0.01, weight_decay=0.1)
    assert {group["weight_decay"] for group in groups} == {0.0}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapted.param_groups(0.01)


def test_half_precision_weights_are_decomposed_exactly():
    model = small_model(dtype=torch.bfloat16)
    weight = model.body.first.weight.detach().double()
    adapted = lowdim.adapt(model, LoLDU(rank=6), dtype=torch.float32)
    perm, _, d, _ = ldu(weight)
    update = adapted.layers["body.first"].update
    assert relative_error(update.z0, d[:6]) < 1e-7
    assert update.pivots.tolist() == perm[:6].tolist()
    assert model(sample_input(dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_bad_input():
    for bad in (0.0, -1.0, float("nan"), None):
        with pytest.raises(ValueError, match="alpha"):
            LoLDU(alpha=bad)
    with pytest.raises(ValueError, match=r"init must be one of ldu, .* got 'lu'"):
        LoLDU(init="lu")
    with pytest.raises(ValueError, match="rank"):
        LoLDU(rank=0)
    layer = nn.Linear(4, 3)
    with pytest.raises(ValueError, match=r"at most min.* = 3; got 4"):
        LoLDU(rank=4).attach(layer)
    layer.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"LoLDU on layer 0.*NaN"):
        lowdim.adapt(nn.Sequential(layer), LoLDU(rank=1))
    with pytest.raises(TypeError, match="Embedding"):
        LoLDU(rank=1).attach(nn.Embedding(4, 3))

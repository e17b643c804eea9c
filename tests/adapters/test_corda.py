import warnings

import pytest
import torch
from adapter_starts import leading
from adapter_vectors import layer_of
from torch import nn

import lowdim
import vectors
from lowdim.adapters import CorDA, LoRA, discard
from lowdim.calibrate import collect
from lowdim.files import read_tensors
from lowdim.linalg import context_svd, stream
from lowdim.plan.kept import kept_tensors
from lowdim.surgery import matrix_shape, weight_matrix
from lowdim.testing.adapter_case import AdapterCase
from lowdim.testing.closeness import relative_error
from lowdim.testing.sample_layers import make_layer
from lowdim.testing.small_model import sample_input, small_model


def covariance(n, rows=None, seed=7):
    x = torch.randn(rows or 4 * n, n, generator=stream(seed, "corda"), dtype=torch.float64)
    return x.T @ x / len(x)


class TestCorDA(AdapterCase):
    random_start = False  # everything follows from weight and samples
    lr = 0.01
    scale = 1.0
    chosen = slice(None, 2)  # of the components, in descending order

    def method(self, **changes):
        return CorDA(**{"rank": self.rank, **changes})

    def dense(self, update):
        return self.scale * (update.B @ update.A - update.B0 @ update.A0)

    def components(self, weight, stats):
        """`U √(Σ/c)` and `√(Σ/c) Vᵀ` of the chosen components: `W C̃ = U Σ V₀ᵀ`, `Vᵀ = V₀ᵀ C̃⁻¹`."""
        C = stats["covariance"]
        damped = C + 0.01 * C.diagonal().mean() * torch.eye(len(C), dtype=C.dtype)
        U, S, V0 = leading(weight @ damped, len(weight))
        V = torch.linalg.solve(damped, V0[self.chosen].T).T  # C̃ is symmetric
        root = (S[self.chosen] / self.scale).sqrt()
        return U[:, self.chosen] * root, root[:, None] * V

    def start(self, weight, stats):
        B, A = self.components(weight, stats)
        return {"B": B, "A": A, "B0": B, "A0": A}

    def taken(self, weight, stats):
        B, A = self.components(weight, stats)
        return self.scale * B @ A

    def stats(self, layer):
        return {"covariance": covariance(matrix_shape(layer)[1])}  # collected as context_covariance, given under this name

    def max_delta_rank(self, out_features, in_features):
        return 4  # B A − B0 A0


@pytest.mark.slow
class TestCorDAKnowledge(TestCorDA):
    alpha = 5.0
    chosen = slice(-2, None)

    @property
    def scale(self):
        return self.alpha / self.rank

    def method(self, **changes):
        return CorDA(**{"rank": self.rank, "alpha": self.alpha, "mode": "knowledge", **changes})


@pytest.mark.parametrize("alpha", [None, 7.0])
@pytest.mark.parametrize("name", vectors.cases("corda"))
def test_vectors(name, alpha):
    case = vectors.load("corda", name)
    how = case.hyperparameters
    method = CorDA(rank=how["rank"], alpha=alpha, mode=how["mode"], damp=how["damp"])
    adapted = method.attach(layer_of(case), stats={"covariance": case["covariance"]})
    A, B, scale = adapted.update.A.detach(), adapted.update.B.detach(), adapted.update.scaling
    assert scale == (1.0 if alpha is None else alpha / how["rank"])
    case.close(scale * B @ A, "product")
    case.close(weight_matrix(adapted.base), "base_weight", scale=float(case["W"].abs().max()))
    case.close(scale * (B.T @ B).diagonal(), "singular_values")
    C = case["covariance"]
    damped = C + how["damp"] * C.diagonal().mean() * torch.eye(len(C), dtype=C.dtype)
    case.close(scale * A @ damped @ damped @ A.T, "A_gram")
    case.close(adapted(case["x"]), "y0")


def test_attaching_needs_only_a_covariance():
    layer = make_layer("linear")
    adapted = CorDA(rank=3).attach(layer, stats={"covariance": covariance(12)})
    x = torch.randn(5, 12, dtype=torch.float64)
    assert relative_error(adapted(x), layer(x)) < 1e-12
    assert adapted.update.A.shape == (3, 12)
    assert adapted.update.B.shape == (9, 3)
    assert not adapted.delta().any()
    assert adapted.delta_norm() == 0


def test_the_modes_take_the_two_ends():
    layer, C = make_layer("linear"), covariance(12)
    U, S, Vh = context_svd(layer.weight, C)
    for mode, chosen in (("instruction", slice(0, 2)), ("knowledge", slice(7, 9))):
        update = CorDA(rank=2, mode=mode).attach(layer, stats={"covariance": C}).update
        assert relative_error(update.B @ update.A, U[:, chosen] * S[chosen] @ Vh[chosen]) < 1e-10


def test_the_scale_of_the_covariance_and_alpha_do_not_matter():
    layer, C = make_layer("linear"), covariance(12)
    start = CorDA(rank=2).attach(layer, stats={"covariance": C}).update.dense()
    for alpha, scale in ((None, 1e6), (0.1, 1.0), (16.0, 1e-6)):
        other = CorDA(rank=2, alpha=alpha).attach(layer, stats={"covariance": scale * C}).update
        assert relative_error(other.dense(), start) < 1e-9


def test_adapt_collects_what_each_layer_sees():
    model, batches = small_model(), [sample_input(9, seed=s).view(3, 3, 8) for s in range(4)]
    layers = {name: model.get_submodule(name) for name in ("body.first", "body.second")}
    stats = collect(model, layers, {"context_covariance"}, batches)
    want = {name: CorDA(rank=2).attach(layer, stats=stats[name]) for name, layer in layers.items()}
    adapted = lowdim.adapt(model, CorDA(rank=2), batches=batches)
    for name, layer in adapted.layers.items():
        assert torch.equal(layer.update.A, want[name].update.A)
        assert not torch.equal(layer.update.A, CorDA(rank=2).attach(layers[name], stats=self_covariance(layer)).update.A)
    assert stats["body.first"]["samples"] == 12


def self_covariance(layer):
    return {"covariance": torch.eye(layer.in_features)}


def test_padding_does_not_count():
    model = nn.Sequential(nn.Linear(4, 3))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.up = nn.Linear(4, 3)

        def forward(self, x, attention_mask=None):
            return self.up(x)

    x = torch.randn(6, 5, 4, generator=stream(0))
    mask = torch.ones(6, 5, dtype=torch.int64)
    padded = torch.cat([x, torch.full((6, 2, 4), 1e6)], 1)
    mask = torch.cat([mask, torch.zeros(6, 2, dtype=torch.int64)], 1)
    updates = []
    for batch in ({"x": x}, {"x": padded, "attention_mask": mask}):
        model = Model()
        updates.append(lowdim.adapt(model, CorDA(rank=2, target_modules=["up"]), batches=[batch]).layers["up"].update)
    assert relative_error(updates[1].dense(), updates[0].dense()) < 1e-6


def test_few_samples_warn_and_a_silent_one_is_refused():
    with pytest.warns(UserWarning, match=r"layer body\.second with 12 inputs saw 10 rows"):
        lowdim.adapt(small_model(), CorDA(rank=2), batches=[sample_input(10)])
    with pytest.raises(ValueError, match=r"layer body\.first: the largest input of a sample is 0"):
        lowdim.adapt(small_model(), CorDA(rank=2), batches=[torch.zeros(20, 8)])
    with pytest.raises(ValueError, match=r"layer body\.first: the largest input of a sample is nan"):
        lowdim.adapt(small_model(), CorDA(rank=2), batches=[torch.full((20, 8), torch.nan)])


def test_a_small_change_is_measured_exactly():
    """In float32, differences of the products would be nothing but rounding here."""
    adapted = CorDA(rank=3).attach(make_layer("linear", torch.float32), stats={"covariance": covariance(12)})
    update = adapted.update
    with torch.no_grad():
        update.A[0, 0] *= 1 + 1e-6
        step = update.A[0, 0].double() - update.A0[0, 0].double()
    want = torch.zeros(9, 12, dtype=torch.float64)
    want[:, 0] = update.B0[:, 0].double() * step
    assert float(step) != 0
    assert relative_error(adapted.delta(), want) < 1e-5
    assert abs(adapted.delta_norm() / float(want.norm()) - 1) < 1e-5


def test_the_smallest_components_survive_low_precision():
    layer = make_layer("linear", torch.float32)
    with torch.no_grad():
        u, _, vh = torch.linalg.svd(layer.weight.double(), full_matrices=False)
        layer.weight.copy_(u * torch.logspace(0, -6, 9) @ vh)
    C = covariance(12).float()
    update = CorDA(rank=2, mode="knowledge").attach(layer, stats={"covariance": C}).update
    U, S, Vh = context_svd(layer.weight.double(), C.double())
    assert relative_error(update.B.double() @ update.A.double(), U[:, 7:] * S[7:] @ Vh[7:]) < 1e-5


def test_training_keeps_no_more_than_lora():
    layer, x = make_layer("linear"), torch.randn(40, 12, dtype=torch.float64)
    ours = CorDA(rank=2).attach(layer, stats={"covariance": covariance(12)})
    lora = LoRA(rank=2).attach(layer)
    sizes = [sum(t.numel() for t in kept_tensors(lambda a=a: a(x), a)) for a in (ours, lora)]
    assert sizes[0] == sizes[1] == 40 * 2 + 40 * 12


def test_a_checkpoint_holds_the_start_too(tmp_path):
    adapted = lowdim.adapt(small_model(), CorDA(rank=2), batches=[sample_input(20)])
    adapted.save(tmp_path)
    tensors, _ = read_tensors(tmp_path / "adapter.safetensors")
    assert {name.rpartition(".")[2] for name in tensors} == {"A", "B", "A0", "B0"}


def test_weight_decay_is_refused_with_a_warning():
    adapted = lowdim.adapt(small_model(), CorDA(rank=2), batches=[sample_input(20)])
    with pytest.warns(UserWarning, match="weight_decay=0.1 is not applied to CorDA"):
        groups = adapted.param_groups(0.01, weight_decay=0.1)
    assert {group["weight_decay"] for group in groups} == {0.0}


def beside_peft(mode):
    """A model that PEFT has decomposed, its configuration, and the same model with our CorDA."""
    peft = pytest.importorskip("peft")
    pytest.importorskip("attr", reason="peft's corda needs the package attrs")
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(48, 32), nn.Tanh(), nn.Linear(32, 40))

    names, samples = ["0", "2"], [torch.randn(1, 64, 48, generator=stream(s, "peft")) for s in range(3)]
    method = CorDA(rank=6, alpha=18, mode=mode, target_modules=names)
    config = peft.LoraConfig(
        r=6,
        lora_alpha=18,
        target_modules=names,
        init_lora_weights="corda",
        corda_config=CordaConfig(corda_method={"instruction": "ipm", "knowledge": "kpm"}[mode]),
    )
    model = build()
    preprocess_corda(model, config, run_model=lambda: [model(x) for x in samples])
    return model, config, lowdim.adapt(build(), method, batches=samples)


@pytest.mark.parametrize("mode", ["instruction", "knowledge"])
def test_the_start_is_that_of_peft(mode):
    model, config, ours = beside_peft(mode)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = pytest.importorskip("peft").get_peft_model(model, config).base_model.model
    for name, layer in ours.layers.items():
        other = theirs.get_submodule(name)
        product = other.scaling["default"] * other.lora_B["default"].weight @ other.lora_A["default"].weight
        assert relative_error(layer.update.dense(), product) < 1e-5
        assert relative_error(weight_matrix(layer.base), other.base_layer.weight) < 1e-5


@pytest.mark.parametrize("mode", ["instruction", "knowledge"])
def test_the_start_is_that_of_peft_in_float64(mode, monkeypatch):
    """PEFT casts to float32, which leaves five or six digits of its inverse and vectors; made to cast to float64 it agrees."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        model, _, ours = beside_peft(mode)
    finally:
        torch.set_default_dtype(before)
    for name, layer in ours.layers.items():
        theirs = model.get_submodule(name).eigens
        assert layer.update.A.dtype == theirs.S_WC.dtype == torch.float64
        assert relative_error(layer.update.dense(), theirs.U_WC * theirs.S_WC @ theirs.V_WC.T) < 1e-10


@pytest.mark.parametrize("shape", [(9, 12), (12, 9)])
def test_discard(shape):
    W, C = torch.randn(shape, generator=stream(3), dtype=torch.float64), covariance(shape[1])
    U, S, Vh = context_svd(W, C)
    assert relative_error(discard(W, C, 0), W) < 1e-10
    assert not discard(W, C, 9).any()
    for r in (1, 4, 8):
        got = discard(W, C, r)
        assert torch.linalg.matrix_rank(got) == 9 - r
        assert relative_error(W - got, U[:, 9 - r :] * S[9 - r :] @ Vh[9 - r :]) < 1e-9
    layer = nn.Linear(shape[1], shape[0], dtype=torch.bfloat16)
    got = discard(layer, C, 2)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, discard(layer.weight, C, 2))
    for bad in (-1, 10, True, 1.5):
        with pytest.raises(ValueError, match=r"r must be an int in \[0, 9\]"):
            discard(W, C, bad)
    with pytest.raises(ValueError, match="all zero"):
        discard(W, 0 * C, 1)


def test_discarding_by_context_keeps_more_of_the_output_than_plain_svd():
    W = torch.randn(20, 30, generator=stream(4), dtype=torch.float64)
    x = torch.randn(400, 30, generator=stream(5), dtype=torch.float64) * torch.logspace(0, -2, 30)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    plain = U[:, :10] * S[:10] @ Vh[:10]
    ours = discard(W, x.T @ x, 10)
    assert torch.dist(x @ ours.T, x @ W.T) < 0.5 * torch.dist(x @ plain.T, x @ W.T)


def test_bad_input():
    layer = nn.Linear(4, 3)
    good = torch.eye(4)
    for stats in (None, {}, {"context_covariance": good}):
        with pytest.raises(ValueError, match=r"CorDA needs stats\['covariance'\]"):
            CorDA(rank=1).attach(layer, stats=stats)
    for bad, match in [
        (torch.eye(3), r"must have shape \(4, 4\); got \(3, 3\)"),
        (good * torch.nan, "NaN or infinite"),
        (0 * good, "all zero"),
    ]:
        with pytest.raises(ValueError, match=match):
            CorDA(rank=1).attach(layer, stats={"covariance": bad})
    with pytest.raises(ValueError, match="batches is missing: context_covariance"):
        lowdim.adapt(nn.Sequential(layer), CorDA(rank=1))
    with pytest.raises(ValueError, match=r"CorDA on layer 0.*no inverse"):
        lowdim.adapt(nn.Sequential(layer), CorDA(rank=1, max_inverse_error=1e-30), batches=[torch.randn(9, 4)])
    with pytest.raises(ValueError, match=r"mode must be one of instruction, knowledge; got 'kpm'"):
        CorDA(mode="kpm")
    for name, value in [("alpha", 0.0), ("damp", 0.0), ("damp", None), ("max_inverse_error", -1.0), ("rank", 0)]:
        with pytest.raises(ValueError, match=name):
            CorDA(**{name: value})
    with pytest.raises(ValueError, match=r"at most min.* = 3; got 4"):
        CorDA(rank=4).attach(layer, stats={"covariance": good})
    layer.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        CorDA(rank=1).attach(layer, stats={"covariance": good})
    with pytest.raises(TypeError, match="Embedding"):
        CorDA(rank=1).attach(nn.Embedding(4, 3), stats={"covariance": torch.eye(3)})

import math

import pytest
import torch
from adapter_vectors import layer_of, train
from torch import nn

import lowdim
import vectors
from lowdim.adapters import NOLA
from lowdim.errors import CheckpointError
from lowdim.files import read_tensors
from lowdim.linalg import derive_seed, random_rows
from lowdim.plan import measure
from lowdim.plan.kept import kept_tensors
from lowdim.testing.adapter_case import AdapterCase
from lowdim.testing.closeness import relative_error
from lowdim.testing.sample_layers import make_layer
from lowdim.testing.small_model import sample_input, small_model


class TestNOLA(AdapterCase):
    random_start = False  # a and b start at zero, and the bases come from the method's own seed
    lr = 0.05
    rank, alpha, bases = 2, 5, 24

    def method(self, **changes):
        return NOLA(**{"rank": self.rank, "num_bases": self.bases, "alpha": self.alpha, **changes})

    def dense(self, update):
        """`c · B A`, `A = A0 + Σ a_i bases_A[i] / √k`, `B = Σ b_i bases_B[i] / √k`."""
        A0, bases_A, bases_B = self.drawn(update)
        A = A0 + torch.einsum("k,kri->ri", update.a, bases_A) / math.sqrt(self.bases)
        B = torch.einsum("k,kor->or", update.b, bases_B) / math.sqrt(self.bases)
        return self.alpha / self.rank * B @ A

    def drawn(self, update):
        """U(±1/√in), U(±1), U(±1) in float32, each from a stream of its own."""
        rows, out, n = self.rank, update.out_features, update.in_features
        A0, bases_A, bases_B = (
            random_rows(derive_seed(update.seed, "NOLA", name), 0, count, size).view(shape)
            for name, count, size, shape in [
                ("A0", 1, rows * n, (rows, n)),
                ("bases_A", self.bases, rows * n, (self.bases, rows, n)),
                ("bases_B", self.bases, out * rows, (self.bases, out, rows)),
            ]
        )
        return (A0 * (1 / math.sqrt(n))).double(), bases_A.double(), bases_B.double()

    def start(self, weight, stats):
        return {"a": 0.0, "b": 0.0}

    def max_delta_rank(self, out_features, in_features):
        return 2

    # Unlike LoRA's, its rank may exceed the layer's sides: more of it costs no further trained number.
    def test_errors_name_the_layer(self):
        for bad in (0, -1, True, 1.5):
            with pytest.raises(ValueError, match="rank"):
                self.method(rank=bad)
        with pytest.raises(ValueError, match="dropout"):
            self.method(dropout=1.0)
        assert self.adapt(small_model(), method=self.method(rank=9)).model(sample_input()).shape == (5, 3)


class TestCached(TestNOLA):
    def method(self, **changes):
        return super().method(**{"materialize": "cache", **changes})

    def drawn(self, update):
        return update.A0, update.bases_A, update.bases_B


@pytest.mark.parametrize("name", vectors.cases("nola"))
def test_vectors(name):
    case = vectors.load("nola", name)
    how = case.hyperparameters
    method = NOLA(rank=how["rank"], num_bases=how["num_bases"], alpha=how["alpha"], materialize="cache")
    adapted = method.attach(layer_of(case))
    update = adapted.update
    assert not adapted.delta().any()
    with torch.no_grad():
        for key, tensor in [
            ("A0", update.A0), ("bases_A", update.bases_A), ("bases_B", update.bases_B), ("a0", update.a), ("b0", update.b),
        ]:  # fmt: skip
            tensor.copy_(case[key])
    case.close(adapted(case["x"]), "y0")
    case.close(adapted.delta(), "delta0")

    def check(step):
        if step == 0:
            case.close(update.a.grad, "grad_a")
            case.close(update.b.grad, "grad_b")
        case.close(adapted.delta(), case["delta_steps"][step])

    train(case, adapted, how["steps"], check)
    assert torch.equal(adapted.base.weight, case["W"])


def test_numbers_and_start():
    update = NOLA(rank=3, num_bases=40, alpha=6, materialize="cache").attach(nn.Linear(30, 20)).update
    assert update.scaling == 2
    assert [update.a.shape, update.b.shape] == [(40,), (40,)]
    assert not update.a.any()
    assert not update.b.any()
    assert update.A0.shape == (3, 30)
    assert update.bases_A.shape == (40, 3, 30)
    assert update.bases_B.shape == (40, 20, 3)
    assert 0.9 / math.sqrt(30) < float(update.A0.abs().max()) < 1 / math.sqrt(30)
    assert torch.equal(update.A(), update.A0)
    assert not update.B().any()
    for bases in (update.bases_A, update.bases_B):
        assert abs(float(bases.mean())) < 0.03
        assert abs(float(bases.var()) * 3 - 1) < 0.05


def test_the_factors_are_divided_by_the_root_of_how_many_bases():
    update = NOLA(rank=3, num_bases=16, materialize="cache").attach(nn.Linear(10, 8, dtype=torch.float64)).update
    with torch.no_grad():
        update.a.normal_()
        update.b.normal_()
    torch.testing.assert_close(update.A(), update.A0 + torch.einsum("k,kri->ri", update.a, update.bases_A) / 4)
    torch.testing.assert_close(update.B(), torch.einsum("k,kor->or", update.b, update.bases_B) / 4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_drawing_again_gives_the_same_bits_as_caching(dtype):
    layer, x = make_layer("linear", dtype), torch.randn(4, 12).to(dtype)
    runs = []
    for materialize in ("recompute", "cache"):
        adapted = NOLA(rank=3, num_bases=10, seed=4, materialize=materialize).attach(layer)
        optimizer = torch.optim.AdamW(adapted.update.parameters(), lr=0.05)
        for _ in range(3):
            optimizer.zero_grad()
            adapted(x).square().mean().backward()
            optimizer.step()
        runs.append([adapted.update.a, adapted.update.b, adapted(x)])
    assert runs[0][0].any()
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_narrow_bases_are_the_wide_ones_rounded():
    wide, half = (NOLA(rank=2, num_bases=5, materialize="cache").attach(make_layer("linear", dtype)).update
                  for dtype in (torch.float32, torch.bfloat16))  # fmt: skip
    for name in ("A0", "bases_A", "bases_B"):
        assert getattr(half, name).dtype == torch.bfloat16
        assert torch.equal(getattr(half, name), getattr(wide, name).bfloat16())


def test_layers_of_a_model_differ_and_a_single_one_takes_the_seed_itself():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    adapted = lowdim.adapt(model, NOLA(rank=2, num_bases=4, seed=3))
    first, second = (adapted.layers[name].update for name in "01")
    assert not torch.equal(first.A(), second.A())
    alone = NOLA(rank=2, num_bases=4, seed=3).attach(nn.Linear(6, 6)).update
    assert alone.seed == 3
    other = NOLA(rank=2, num_bases=4, seed=4).attach(nn.Linear(6, 6)).update
    assert not torch.equal(alone.A(), other.A())
    again = lowdim.adapt(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), NOLA(rank=2, num_bases=4, seed=3), seed=9)
    assert torch.equal(again.layers["1"].update.A(), second.A())


@pytest.mark.parametrize("materialize", ["recompute", "cache"])
def test_a_checkpoint_holds_the_coefficients_and_seeds(tmp_path, materialize):
    model = nn.Sequential(nn.Linear(6, 6))
    adapted = lowdim.adapt(model, NOLA(rank=2, num_bases=4, seed=3, materialize=materialize))
    with torch.no_grad():
        for parameter in adapted.trainable().values():
            parameter.normal_()
    adapted.save(tmp_path)
    tensors, about = read_tensors(tmp_path / "adapter.safetensors")
    assert {key: tuple(value.shape) for key, value in tensors.items()} == {"0.update.a": (4,), "0.update.b": (4,)}
    assert set(adapted.layers["0"].update.state_dict()) == {"a", "b"}
    assert f'"seed": {adapted.layers["0"].update.seed}' in about["lowdim"]
    twin = nn.Sequential(nn.Linear(6, 6))
    twin.load_state_dict(dict(zip(twin.state_dict(), (model[0].base.weight, model[0].base.bias))))
    loaded = lowdim.load_adapter(twin, tmp_path)
    assert torch.equal(loaded.layers["0"].update.A(), adapted.layers["0"].update.A())
    assert torch.equal(loaded.layers["0"].update.B(), adapted.layers["0"].update.B())


def test_a_file_with_other_bases_is_refused():
    update = NOLA(rank=2, num_bases=4).attach(nn.Linear(6, 6)).update
    with pytest.raises(CheckpointError, match="a missing"):
        update.restore({"a": torch.ones(5), "b": torch.ones(4)}, torch.zeros(6, 6))


def test_leaving_the_meta_device_draws_the_bases():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(6, 8))
    method = NOLA(rank=2, num_bases=4, materialize="cache")
    adapted = lowdim.adapt(model, method, initialise=False)
    model.to_empty(device="cpu")
    want = lowdim.adapt(nn.Sequential(nn.Linear(6, 8)), method).layers["0"].update
    got = adapted.layers["0"].update
    for name in ("A0", "bases_A", "bases_B"):
        assert torch.equal(getattr(got, name), getattr(want, name))
    model.double()
    assert torch.equal(got.bases_A, want.bases_A.double())


def _peak(num_bases):
    adapted = NOLA(rank=16, num_bases=num_bases).attach(nn.Linear(384, 384, bias=False))
    x = torch.randn(2, 384, requires_grad=True)
    return measure(lambda: adapted(x).sum().backward(), model=adapted, tensors=[x]).bytes


def test_no_more_than_a_chunk_of_bases_is_ever_held():
    basis = 16 * 384 * 4  # bytes
    few, many = _peak(64), _peak(512)
    assert many <= few + (1 << 20)  # a chunk has 2¹⁸ numbers
    assert many - 384 * 384 * 4 < 128 * basis  # less than an eighth of all bases, beside the weight


def test_the_backward_pass_keeps_the_two_factors_and_what_lora_keeps():
    adapted = NOLA(rank=3, num_bases=200).attach(make_layer("linear"))
    x = torch.randn(50, 12, dtype=torch.float64, requires_grad=True)
    sizes = sorted(t.numel() for t in kept_tensors(lambda: adapted(x), adapted))
    assert sum(sizes) <= 50 * 12 + 50 * 3 + 3 * 12 + 9 * 3  # x, A x, A, B


def test_no_random_state_is_touched_and_dropout_is_what_it_would_be():
    adapted = NOLA(rank=2, num_bases=4, dropout=0.5).attach(nn.Linear(6, 6)).train()
    with torch.no_grad():
        adapted.update.b.fill_(1.0)
    x = torch.ones(3, 6)
    torch.manual_seed(0)
    got = adapted(x)
    got.sum().backward()
    state = torch.get_rng_state()
    torch.manual_seed(0)
    dropped = nn.functional.dropout(x, 0.5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(got, adapted.base(x) + adapted.update(dropped))


def test_a_rank_beyond_the_layer_is_exported_exactly(tmp_path):
    peft = pytest.importorskip("peft")
    model = small_model()
    adapted = lowdim.adapt(model, NOLA(rank=20, num_bases=8))
    with torch.no_grad():
        for parameter in adapted.trainable().values():
            parameter.normal_()
    report = adapted.export(tmp_path)
    assert max(report.errors.values()) < 1e-6
    loaded = peft.PeftModel.from_pretrained(small_model(), tmp_path)
    assert relative_error(loaded(sample_input()), model(sample_input())) < 1e-5


def test_the_order_of_the_bases_is_that_of_their_numbers():
    few, many = (NOLA(rank=2, num_bases=k, materialize="cache").attach(nn.Linear(6, 5)).update for k in (3, 7))
    assert torch.equal(few.bases_A, many.bases_A[:3])
    assert torch.equal(many.bases_B[4], random_rows(many._seeds["bases_B"], 4, 5, 10).view(5, 2))
    assert torch.equal(few.A0, many.A0)


def test_bad_input():
    for field in ("rank", "num_bases"):
        for bad in (0, -1, True, 2.0):
            with pytest.raises(ValueError, match=field):
                NOLA(**{field: bad})
    with pytest.raises(ValueError, match=r"materialize must be one of recompute, cache; got 'always'"):
        NOLA(materialize="always")
    with pytest.raises(ValueError, match="alpha"):
        NOLA(alpha=0)
    with pytest.raises(ValueError, match="seed"):
        NOLA(seed=-1)
    with pytest.raises(TypeError, match="Embedding"):
        NOLA().attach(nn.Embedding(4, 3))

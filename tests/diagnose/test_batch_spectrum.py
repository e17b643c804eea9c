import copy
import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lowdim.diagnose import batch_spectrum
from lowdim.linalg import stream
from lowdim.testing.result_case import ResultCase


def problem(n=20, dtype=torch.float64):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Dropout(0.5), nn.Linear(3, 2)).to(dtype)
    g = stream(0, "batch spectrum")
    return net, torch.randn(n, 3, generator=g, dtype=torch.float64).to(dtype), torch.randint(2, (n,), generator=g)


def hessian(net, x, y):
    """Dense, from autograd, in the order of `parameters()`."""
    names, params = zip(*net.named_parameters())

    def loss(flat):
        parts = flat.split([p.numel() for p in params])
        given = {name: part.view_as(p) for name, part, p in zip(names, parts, params)}
        return F.cross_entropy(torch.func.functional_call(net.eval(), given, (x,)), y)

    return torch.autograd.functional.hessian(loss, torch.cat([p.detach().flatten() for p in params]))


class TestBatchSpectrum(ResultCase):
    plots = True
    tolerance = 1e-8
    unchecked = {  # noqa: RUF012
        "nodes": "all eigenvalues: compared below", "weights": "of a random start", "bounds": "zero with all steps",
        "largest_bound": "zero with all steps", "smallest_bound": "zero with all steps", "measured_bound": "the same",
    }  # fmt: skip

    def result(self):
        net, x, y = problem()
        return batch_spectrum(net, F.cross_entropy, x, y, 5, steps=20, batches=2, probes=2, seed=1)

    def expected(self):
        """Dense Hessians over all samples and over the batches that the seed draws; `1/b = 1/5 − 1/20`."""
        net, x, y = problem()
        draw = stream(1, "batch_spectrum")
        chosen = [torch.randperm(20, generator=draw)[:5] for _ in range(2)]
        probes = torch.randint(0, 2, (2, 20), generator=draw).double() * 2 - 1
        H, parts = hessian(net, x, y), [hessian(net, x[rows], y[rows]) for rows in chosen]
        squares = [((part - H) @ v).square().sum() for part in parts for v in probes]
        b, P = 20 / 3, 20
        s2 = float(b / P**2 * sum(squares) / 4)
        top, low = (float(torch.linalg.eigvalsh(H)[i]) for i in (-1, 0))
        tops, lows = ([float(torch.linalg.eigvalsh(part)[i]) for part in parts] for i in (-1, 0))
        edge2 = P / b * s2
        predicted = top + edge2 / top if top > edge2**0.5 else 2 * edge2**0.5
        return {
            "optimizer": "sgd", "batch_size": 5, "n_data": 20, "n_params": 20,
            "largest": top, "smallest": low, "variance": s2,
            "predicted": {
                "largest": predicted,
                "smallest": low + edge2 / low if low < -(edge2**0.5) else -2 * edge2**0.5,
                "spiked": top > edge2**0.5,
            },
            "measured_largest": sum(tops) / 2, "measured_smallest": sum(lows) / 2,
            "spread": abs(tops[0] - tops[1]) / 2**0.5,
            "max_lr": 2 / predicted, "measured_lr": 2 / (sum(tops) / 2),
            "products": self.result().products,
        }  # fmt: skip

    def refusals(self):
        net, x, y = problem()
        loss = F.cross_entropy
        frozen = copy.deepcopy(net).requires_grad_(False)
        nan = x.clone()
        nan[7, 1] = math.nan
        return [
            (TypeError, "batch_size is required", lambda: batch_spectrum(net, loss, x, y)),
            (ValueError, "batch_size must be an int in [1, 20]; got 21", lambda: batch_spectrum(net, loss, x, y, 21)),
            (ValueError, "batch_size must be an int in [1, 20]; got 0", lambda: batch_spectrum(net, loss, x, y, 0)),
            (ValueError, "steps", lambda: batch_spectrum(net, loss, x, y, 4, steps=0)),
            (ValueError, "batches", lambda: batch_spectrum(net, loss, x, y, 4, batches=0)),
            (ValueError, "probes", lambda: batch_spectrum(net, loss, x, y, 4, probes=0)),
            (ValueError, "optimizer", lambda: batch_spectrum(net, loss, x, y, 4, optimizer="lion")),
            (ValueError, "got [19, 20]", lambda: batch_spectrum(net, loss, x, y[1:], 4)),
            (TypeError, "targets must be given", lambda: batch_spectrum(net, loss, x, None, 4)),
            (TypeError, "loss_fn must be given", lambda: batch_spectrum(net, None, x, y, 4)),
            (ValueError, "no parameter that requires gradients", lambda: batch_spectrum(frozen, loss, x, y, 4)),
            (ValueError, "the loss is nan", lambda: batch_spectrum(net, loss, nan, y, 4)),
        ]

    def test_all_steps_give_the_whole_spectrum(self):
        net, x, y = problem()
        values, found = torch.linalg.eigvalsh(hessian(net, x, y)), self.result()
        assert float((found.nodes[:, None] - values).abs().amin(1).max()) < 1e-9
        assert float(found.weights.sum()) == pytest.approx(1.0)
        assert max(found.largest_bound, found.smallest_bound, found.measured_bound) < 1e-9


def test_the_model_is_left_as_it_was():
    net, x, y = problem(dtype=torch.float32)
    net[0].eval()
    state = torch.random.get_rng_state()
    seen = []
    batch_spectrum(net, F.cross_entropy, x, y, 8, steps=3, batches=1, probes=1, callback=lambda *at: seen.append(at))
    assert [module.training for module in net] == [False, True, True, True]
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert seen == [(i + 1, 8) for i in range(8)]


def test_a_full_batch_is_the_whole():
    net, x, y = problem()
    found = batch_spectrum(net, F.cross_entropy, x, y, 20, steps=20, batches=1, optimizer="adam")
    assert found.variance == 0.0
    assert found.max_lr == math.inf
    assert found.to_dict()["max_lr"] is None
    assert found.measured_largest == pytest.approx(found.largest, rel=1e-9)
    assert found.spread == 0.0


def test_parts_of_the_data_give_the_mean_over_all():
    """Parts of unequal size, and labels that do not count: weighted by those that do."""
    net, x, y = problem()
    y = y.clone()
    y[:9] = -100
    want = torch.linalg.eigvalsh(hessian(net, x, y))
    found = batch_spectrum(net, F.cross_entropy, x, y, 7, steps=20, batches=1, seed=3)
    assert found.largest == pytest.approx(float(want[-1]), rel=1e-8)
    with pytest.raises(ValueError, match="all are -100"):
        batch_spectrum(net, F.cross_entropy, x, torch.full_like(y, -100), 7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_precisions(dtype):
    net, x, y = problem(dtype=dtype)
    found = batch_spectrum(net, F.cross_entropy, x, y, 20, steps=20, batches=1)
    reference = problem()[0].to(dtype).double()
    want = float(torch.linalg.eigvalsh(hessian(reference, x.double(), y))[-1])
    assert found.largest == pytest.approx(want, rel=1e-4 if dtype == torch.float32 else 0.1)
    assert found.nodes.dtype == torch.float64
    json.dumps(found.to_dict(), allow_nan=False)


def test_one_parameter_and_no_curvature():
    one = nn.Linear(1, 1, bias=False)
    x, y = torch.ones(4, 1), torch.zeros(4, 1)
    found = batch_spectrum(one, F.mse_loss, x, y, 2, steps=5)
    assert (found.largest, found.smallest, found.nodes.tolist()) == (2.0, 2.0, [2.0])
    flat = batch_spectrum(one, lambda out, target: out.mean(), x, y, 2, steps=5)
    assert (flat.largest, flat.max_lr, flat.measured_lr) == (0.0, math.inf, math.inf)
    assert flat.to_dict()["measured_lr"] is None


class TestDictBatches:
    """Models of transformers: labels in the batch, padding, causal shift, attention without a fused kernel."""

    def model(self, **how):
        transformers = pytest.importorskip("transformers", reason="dict batches are of its models")
        sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = transformers.LlamaConfig(vocab_size=11, max_position_embeddings=8, **sizes, **how)
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(config).double()

    def batch(self, rows=6):
        g = stream(0, "dict batches")
        ids = torch.randint(11, (rows, 5), generator=g)
        labels = ids.clone()
        labels[2:4, 2:] = -100
        labels[0, 0] = -100
        return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}

    def test_the_whole_is_the_mean_over_its_tokens(self):
        model, batch = self.model(), self.batch()
        how = {"steps": 6, "batches": 1, "probes": 1}
        parts = batch_spectrum(model, None, batch, batch_size=4, **how)
        whole = batch_spectrum(model, None, batch, batch_size=6, **how)
        own = batch_spectrum(model, lambda m, part: m(**part).loss, batch, batch_size=6, **how)
        assert parts.largest == pytest.approx(whole.largest, rel=1e-6)  # transformers computes the loss in float32
        assert own.largest == whole.largest > 0

    def test_attention_is_put_back(self):
        model, batch = self.model(attn_implementation="sdpa"), self.batch()
        eager = self.model(attn_implementation="eager")
        how = {"batch_size": 6, "steps": 4, "batches": 1, "probes": 1}
        want = batch_spectrum(eager, None, batch, **how).largest
        assert batch_spectrum(model, None, batch, **how).largest == pytest.approx(want, rel=1e-6)
        model.set_attn_implementation("flex_attention")  # a kernel of its own
        assert batch_spectrum(model, None, batch, **how).largest == pytest.approx(want, rel=1e-6)
        assert model.config._attn_implementation == "flex_attention"
        model.set_attn_implementation = lambda kinds: None
        with pytest.raises(ValueError, match=r"LlamaForCausalLM computes attention with flex_attention.*\"eager\""):
            batch_spectrum(model, None, batch, **how)

    def test_a_model_without_a_loss_says_so(self):
        batch = self.batch()
        del batch["labels"]
        with pytest.raises(ValueError, match="put labels into the batch"):
            batch_spectrum(self.model(), None, batch, batch_size=2)

import math

import numpy as np
import pytest
import torch

import vectors
from lowdim.diagnose import lora_attention_gradient, lora_limits
from lowdim.testing.result_case import ResultCase

FIELDS = ("bound", "threshold", "ratio", "score_bound")


def head(length=14, width=5, h=3, p=2, seed=0):
    """Input, weights, adapters of q and v, target."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return 0.4 * torch.randn(*shape, generator=g, dtype=torch.float64)

    weights = {"q": draw(h, width), "k": draw(h, width), "v": draw(p, width)}
    adapters = {"q": (draw(2, width), draw(h, 2)), "v": (draw(1, width), draw(p, 1))}
    return draw(length, width), weights, adapters, draw(length, p)


def of_vectors(case):
    weights = {m: case[f"W{m}"] for m in "qkv"}
    return case["x"], weights, {m: (case[f"A{m}"], case[f"B{m}"]) for m in "qkv"}


def by_autograd(x, weights, adapters, target, alpha, attention):
    factors = {m: [f.clone().requires_grad_() for f in pair] for m, pair in adapters.items()}
    q, k, v = (
        x @ (weights[m] + (alpha / len(factors[m][0]) * factors[m][1] @ factors[m][0] if m in factors else 0)).T for m in "qkv"
    )
    output = attention(q @ k.T / math.sqrt(q.shape[1])) @ v
    loss = (output - target).square().sum() / 2
    loss.backward()
    return output, loss, {m: (a.grad, b.grad) for m, (a, b) in factors.items()}


class TestExactGradient(ResultCase):
    def result(self):
        return lora_attention_gradient(*head(), alpha=3.0, method="exact")

    def expected(self):
        output, loss, grads = by_autograd(*head(), 3.0, lambda scores: scores.softmax(1))
        # q, k and v with two adapters; scores, F V, G Vᵀ; dQ, dK, dV; the adapters' two products each for dB and dA
        length, d, h, p = 14, 5, 3, 2
        forward = length * d * (2 * h + p) + length * 2 * (d + h) + length * 1 * (d + p)
        attention = length * length * (h + p + p) + length * length * (2 * h + p)
        backward = 2 * (length * h * 2 + 2 * length * d) + h * length * 2 - length * h * 2
        backward += 2 * (length * p * 1 + length * d) + p * length * 1 - length * p * 1
        return {
            "output": output.detach(),
            "loss": loss.detach(),
            "grads": grads,
            "feature_rank": 14,
            "multiply_adds": forward + attention + backward,
        }

    def refusals(self):
        x, weights, adapters, target = head()

        def call(*, given=(x, weights, adapters, target), **options):
            return lora_attention_gradient(*given, **{"alpha": 1.0, **options})

        tall = {**adapters, "q": (adapters["q"][0], adapters["q"][1][:2])}
        return [
            (ValueError, "method", lambda: call(method="fast")),
            (ValueError, "degree", lambda: call(degree=0)),
            (ValueError, "degree", lambda: call(degree=2.5)),
            (ValueError, "alpha", lambda: call(alpha=0.0)),
            (ValueError, "beta", lambda: call(beta=-1.0)),
            (ValueError, "'k' is missing", lambda: call(given=(x, {m: weights[m] for m in "qv"}, adapters, target))),
            (ValueError, "a key of adapters", lambda: call(given=(x, weights, {"o": adapters["q"]}, target))),
            (ValueError, "a key of weights", lambda: call(given=(x, {**weights, "o": x}, {}, target))),
            (ValueError, "the weight of k", lambda: call(given=(x, {**weights, "k": x[:2]}, {}, target))),
            (ValueError, "the adapter of q", lambda: call(given=(x, weights, tall, target))),
            (ValueError, "target must be (14, 2)", lambda: call(given=(x, weights, adapters, target[1:]))),
            (ValueError, "finite", lambda: call(given=(x * math.nan, weights, adapters, target))),
        ]


class TestChainedGradient(TestExactGradient):
    """The polynomial in place of the exponential, as a dense L x L matrix."""

    unchecked = {"multiply_adds": "its growth is checked below"}  # noqa: RUF012

    def result(self):
        return lora_attention_gradient(*head(), alpha=3.0, degree=4)

    def expected(self):
        x, weights, adapters, target = head()
        q, k, v = (
            x @ (weights[m] + (3.0 / len(adapters[m][0]) * adapters[m][1] @ adapters[m][0] if m in adapters else 0)).T
            for m in "qkv"
        )
        beta = 3**-0.5
        scores = beta * q @ k.T
        polynomial = sum(scores**j / math.factorial(j) for j in range(5))
        f = polynomial / polynomial.sum(1, keepdim=True)
        output = f @ v
        g = output - target
        weighted = f * (g @ v.T)
        ds = weighted - (output * g).sum(1, keepdim=True) * f
        upstream = {"q": beta * ds @ k, "v": f.T @ g}
        grads = {}
        for m, (a, b) in adapters.items():
            dense = upstream[m].T @ x
            grads[m] = (3.0 / len(a) * b.T @ dense, 3.0 / len(a) * dense @ a.T)
        loss = (output - target).square().sum() / 2
        return {"output": output, "loss": loss, "grads": grads, "feature_rank": math.comb(7, 4)}

    def test_higher_degrees_come_closer_to_the_exact_gradient(self):
        exact = lora_attention_gradient(*head(), alpha=3.0, method="exact").grads["q"][1]
        errors = [
            float((lora_attention_gradient(*head(), alpha=3.0, degree=g).grads["q"][1] - exact).norm()) for g in (2, 4, 6)
        ]
        assert errors[0] > 5 * errors[1] > 25 * errors[2]

    def test_operations_grow_with_the_length_and_not_its_square(self):
        counts = {
            method: [
                lora_attention_gradient(*head(length), alpha=1.0, method=method, degree=2).multiply_adds for length in (64, 128)
            ]
            for method in ("exact", "chained")
        }
        assert math.log2(counts["chained"][1] / counts["chained"][0]) == pytest.approx(1.0, abs=0.01)
        assert math.log2(counts["exact"][1] / counts["exact"][0]) > 1.7

    def test_precision(self):
        x, weights, adapters, target = head()
        single = [
            x.float(),
            {m: w.float() for m, w in weights.items()},
            {m: (a.float(), b.float()) for m, (a, b) in adapters.items()},
            target.float(),
        ]
        assert lora_attention_gradient(*single, alpha=1.0, degree=4).output.dtype == torch.float32
        assert lora_attention_gradient(*single, alpha=1.0, degree=6).output.dtype == torch.float64
        half = lora_attention_gradient(x.bfloat16(), *single[1:], alpha=1.0)
        assert half.output.dtype == torch.float32

    def test_an_odd_degree_can_break(self):
        one = torch.ones(2, 1, dtype=torch.float64)
        weights = {"q": 3 * one[:1], "k": -3 * one[:1], "v": one[:1]}
        with pytest.raises(ArithmeticError, match=r"row 0: .* use an even degree"):
            lora_attention_gradient(one, weights, {}, one, alpha=1.0, degree=1)

    def test_no_adapters(self):
        x, weights, _, target = head()
        assert lora_attention_gradient(x, weights, {}, target, alpha=1.0).grads == {}


@pytest.mark.parametrize("degree", [None, 2, 4])
def test_gradient_vectors(degree):
    case = vectors.load("lora-limits", "exact" if degree is None else "chained")
    method = {"method": "exact"} if degree is None else {"degree": degree}
    suffix = "" if degree is None else f"_g{degree}"
    found = lora_attention_gradient(*of_vectors(case), case["y"], alpha=case.hyperparameters["alpha"], **method)
    case.close(found.output, f"output{suffix}")
    case.close(found.loss, f"loss{suffix}")
    for m, (da, db) in found.grads.items():
        case.close(da, f"dA{m}{suffix}")
        case.close(db, f"dB{m}{suffix}")
    if degree is not None:
        exact = lora_attention_gradient(*of_vectors(case), case["y"], alpha=case.hyperparameters["alpha"], method="exact")
        pairs = [pair for m in "qkv" for pair in zip(found.grads[m], exact.grads[m])]
        error = max(float((a - b).abs().max()) for a, b in pairs) / max(float(b.abs().max()) for _, b in pairs)
        assert error == pytest.approx(float(case["errors"][(2, 4).index(degree)]), rel=1e-5)


class TestLimits(ResultCase):
    plots = True

    def result(self):
        x, weights, adapters, _ = head()
        return lora_limits(x, weights, adapters, alpha=3.0, epsilon=0.01)

    def expected(self):
        x, weights, adapters, _ = head()
        norms, places = {}, {}
        whole = {}
        for m in "qkv":
            frozen = (x @ weights[m].T).numpy()
            added = (
                (3.0 / len(adapters[m][0]) * x @ adapters[m][0].T @ adapters[m][1].T).numpy() if m in adapters else 0 * frozen
            )
            whole[m] = frozen + added
            for suffix, part in (("_frozen", frozen), ("_adapter", added), ("", whole[m])):
                norms[m + suffix] = abs(part).max()
                places[m + suffix] = int(np.unravel_index(abs(part).argmax(), part.shape)[0])
        b = 3**-0.5 * np.linalg.norm(whole["q"], axis=1).max() * np.linalg.norm(whole["k"], axis=1).max()
        degree = next(
            g for g in range(40) if math.exp(b) - sum(b**k / math.factorial(k) for k in range(g + 1)) <= 0.01 * math.exp(-b)
        )
        bound, threshold = max(norms["q"], norms["k"]), math.sqrt(math.log(14))
        return {
            "norms": norms,
            "bound": bound,
            "threshold": threshold,
            "ratio": bound / threshold,
            "below": bool(bound < threshold),
            "score_bound": b,
            "degree_needed": degree,
            "feature_rank": math.comb(3 + degree, degree),
            "pays": math.comb(3 + degree, degree) * 2 < 14,
            "largest_at": places,
        }

    def refusals(self):
        x, weights, adapters, _ = head()
        return [
            (ValueError, "at least 2 rows", lambda: lora_limits(x[:1], weights, adapters, alpha=1.0)),
            (ValueError, "epsilon", lambda: lora_limits(x, weights, adapters, alpha=1.0, epsilon=0.0)),
            (ValueError, "max_degree", lambda: lora_limits(x, weights, adapters, alpha=1.0, max_degree=0)),
            (ValueError, "alpha", lambda: lora_limits(x, weights, adapters, alpha=-1.0)),
        ]

    def test_extremes(self):
        x, weights, _, _ = head()
        nothing = lora_limits(0 * x, weights, {}, alpha=1.0)
        assert (nothing.bound, nothing.degree_needed, nothing.feature_rank, nothing.below) == (0.0, 0, 1, True)
        huge = lora_limits(1e6 * x, weights, {}, alpha=1.0)
        assert (huge.degree_needed, huge.feature_rank, huge.pays) == (None, None, False)
        for scale in (3.0, 6.0):  # at the edge of what is looked for
            need = lora_limits(scale * x, weights, {}, alpha=1.0, max_degree=1000).degree_needed
            assert lora_limits(scale * x, weights, {}, alpha=1.0, max_degree=need).degree_needed == need
            assert lora_limits(scale * x, weights, {}, alpha=1.0, max_degree=need - 1).degree_needed is None


def test_limits_vectors():
    case = vectors.load("lora-limits", "limits")
    found = lora_limits(*of_vectors(case), alpha=case.hyperparameters["alpha"], epsilon=case.hyperparameters["epsilon"])
    for name in FIELDS:
        case.close(torch.tensor(getattr(found, name), dtype=torch.float64), name)
    for name, value in found.norms.items():
        case.close(torch.tensor(value, dtype=torch.float64), f"norm.{name}")
    for name in ("degree_needed", "feature_rank", "below", "pays"):
        assert getattr(found, name) == case[name].item()

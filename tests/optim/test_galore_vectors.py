"""GaLore against the authors' numbers."""

import pytest
import torch
from torch import nn
from trajectories import relative_to_update, roundings_apart

import vectors
from lowdim.linalg import dynamic_codebook
from lowdim.optim import GaLore


def follow(case, **options):
    """Run a vector's gradients; the weights (and biases) after each step."""
    hyper = {k: v for k, v in case.hyperparameters.items() if k != "steps"}
    if isinstance(hyper["rank"], list):
        hyper["rank"] = tuple(hyper["rank"])
    p = nn.Parameter(case["weight"].clone())
    groups = [{"params": [p]}]
    q = None
    if "bias" in case:
        q = nn.Parameter(case["bias"].clone())
        groups.append({"params": [q], "rank": None})
    optimizer = GaLore(groups, **{**hyper, **options})
    seen, biases = [], []
    for step, grad in enumerate(case["grads"]):
        p.grad = grad.clone()
        if q is not None:
            q.grad = case["bias_grads"][step].clone()
        optimizer.step()
        seen.append(p.detach().clone())
        if q is not None:
            biases.append(q.detach().clone())
    return optimizer, p, torch.stack(seen), torch.stack(biases) if biases else None


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("name", ["adamw_tall", "adamw_wide", "adamw_reverse_std", "adamw_full"])
def test_vectors_adamw(name, foreach):
    case = vectors.load("galore", name)
    optimizer, p, weights, biases = follow(case, foreach=foreach)
    assert relative_to_update(weights, case["weights_after"], case["weight"]) <= case.tolerance
    assert relative_to_update(biases, case["bias_after"], case["bias"]) <= case.tolerance
    state = optimizer.state[p]
    case.close(state["exp_avg_sq"], "exp_avg_sq")
    if "subspace" in case:
        basis = state.get("right_basis", state.get("left_basis"))
        case.close(basis @ basis.mT, "subspace")


def test_vectors_adafactor():
    case = vectors.load("galore", "adafactor")
    optimizer, p, weights, _ = follow(case)
    assert relative_to_update(weights, case["weights_after"], case["weight"]) <= case.tolerance
    case.close(optimizer.state[p]["row"], "row")
    case.close(optimizer.state[p]["col"], "col")


def test_vectors_adamw8bit():
    case = vectors.load("galore", "adamw8bit")
    assert torch.equal(dynamic_codebook(True), case["codebook_signed"])
    assert torch.equal(dynamic_codebook(False), case["codebook_unsigned"])
    optimizer, p, weights, _ = follow(case)
    assert relative_to_update(weights, case["weights_after"], case["weight"]) <= 2e-3
    m, v = optimizer.parts(optimizer.param_groups[0], 2).inner._load(optimizer.state[p])
    # one code of the coarsest cell apart at most, for entries that lie on an edge
    assert float((m - case["exp_avg_dequantized"]).abs().max()) <= 0.02 * float(m.abs().max())
    assert float((v - case["exp_avg_sq_dequantized"]).abs().max()) <= 0.01 * float(v.abs().max())


def test_vectors_tucker_conv():
    case = vectors.load("galore", "tucker_conv")
    optimizer, p, weights, _ = follow(case)
    assert relative_to_update(weights, case["weights_after"], case["weight"]) <= case.tolerance
    for mode in range(4):
        factor = optimizer.state[p][f"factor{mode}"]
        case.close(factor @ factor.mT, f"projector_mode{mode}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["adamw_tall", "adamw_wide", "adafactor"])
def test_vectors_in_lower_precision(name, dtype):
    """The same trajectory, as far as the weights' dtype can tell it."""
    case = vectors.load("galore", name)
    case.tensors = {k: t.to(dtype) for k, t in case.tensors.items()}
    _, _, weights, _ = follow(case)
    assert roundings_apart(weights, case["weights_after"].double(), dtype) <= 12

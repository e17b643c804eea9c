import copy

import numpy as np
import pytest
import torch
from torch import nn

import vectors
from lowdim.diagnose import intruder_dimensions, reduce_intruders, scale_intruders, scale_intruders_lora, weights_of
from lowdim.testing.agreement import refuses
from lowdim.testing.result_case import ResultCase


def factors(out=20, width=14, rank=3, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    u, v = (torch.linalg.qr(torch.randn(n, min(out, width), generator=g, dtype=torch.float64)).Q for n in (out, width))
    base = u * 0.8 ** torch.arange(min(out, width)) @ v.T
    A, B = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((rank, width), (out, rank)))
    return base.to(dtype), (A / width**0.5).to(dtype), (B / out**0.5).to(dtype)


def dense_route(base, A, B, scaling, **kw):
    """The update that is wanted, as a dense matrix."""
    return (scale_intruders(base, base + scaling * B @ A, **kw) - base) / scaling


def test_vectors():
    case = vectors.load("intruders", "lora_factors")
    h = case.hyperparameters
    A, B = scale_intruders_lora(case["base"], case["A"], case["B"], **h)
    case.close(h["scaling"] * B @ A, "delta")
    assert (A.shape, B.shape) == (case["A"].shape, case["B"].shape)


@pytest.mark.parametrize("shape", [(20, 14, 3), (14, 20, 3), (6, 5, 5), (4, 9, 6)])
@pytest.mark.parametrize("scale", [0.0, 0.5, 1.5])
def test_factors_are_the_best_of_their_rank(shape, scale):
    base, A, B = factors(*shape)
    how = {"scale": scale, "threshold": 0.9}
    assert intruder_dimensions(base, base + 2 * B @ A, threshold=0.9).total > 0
    want = dense_route(base, A, B, 2.0, **how)
    u, s, vh = torch.linalg.svd(want, full_matrices=False)
    r = min(shape[2], len(s))
    A2, B2 = scale_intruders_lora(base, A, B, scaling=2.0, **how)
    assert A2.shape == A.shape
    assert B2.shape == B.shape
    assert torch.allclose(B2 @ A2, u[:, :r] * s[:r] @ vh[:r], atol=1e-12)
    assert torch.allclose(B2.norm(dim=0), A2.norm(dim=1), atol=1e-12)  # the square root goes to both


def test_no_intruder_and_scale_one_give_copies():
    base, A, B = factors()
    for got, old in zip(scale_intruders_lora(base, A, 1e-6 * B, scaling=1.0), (A, 1e-6 * B)):
        assert torch.equal(got, old)
        assert got.data_ptr() != old.data_ptr()
    assert all(torch.equal(x, y) for x, y in zip(scale_intruders_lora(base, A, B, scaling=2.0, scale=1.0), (A, B)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factor_dtypes_are_kept(dtype):
    base, A, B = factors(dtype=dtype)
    A2, B2 = scale_intruders_lora(base, A, B, scaling=3.0, scale=0.5)
    assert A2.dtype == B2.dtype == dtype
    want_A, want_B = scale_intruders_lora(base.double(), A.double(), B.double(), scaling=3.0, scale=0.5)
    error = (B2.double() @ A2.double() - want_B @ want_A).norm() / (want_B @ want_A).norm()
    assert error < (1e-5 if dtype == torch.float32 else 2e-2)


def plain():
    model = nn.Sequential(nn.Linear(14, 20), nn.ReLU(), nn.Linear(20, 14))
    with torch.no_grad():
        model[0].weight.copy_(factors(20, 14, seed=0)[0])
        model[2].weight.copy_(factors(14, 20, seed=1)[0])
    return model


def tuned_plain():
    model = plain()
    with torch.no_grad():
        _, A, B = factors(20, 14, seed=0)
        model[0].weight.add_((2 * B @ A).float())
    return model


@pytest.mark.parametrize("as_dict", [False, True])
def test_a_plain_model_is_changed_in_place(as_dict):
    base, tuned = plain(), tuned_plain()
    old = {k: v.clone() for k, v in tuned.state_dict().items()}
    want = scale_intruders(base[0].weight, tuned[0].weight, scale=0.5)
    changes = reduce_intruders(base, dict(tuned.state_dict()) if as_dict else tuned, scale=0.5)
    assert torch.equal(tuned[0].weight, want)
    assert changes["0.weight"] == pytest.approx(((want - old["0.weight"]).norm() / old["0.weight"].norm()).item(), rel=1e-4)
    assert changes["2.weight"] == 0.0
    assert torch.equal(tuned[2].weight, old["2.weight"])
    assert not changes.truncation
    assert tuned[0].weight.requires_grad


class TestReduction(ResultCase):
    tolerance = 1e-5  # the weights are float32

    def result(self):
        return reduce_intruders(plain(), tuned_plain(), scale=0.5)

    def expected(self):
        changes = {}
        for i in (0, 2):
            w0, w = (model[i].weight.detach().numpy().astype(np.float64) for model in (plain(), tuned_plain()))
            (u0, _, _), (u, s, vt) = (np.linalg.svd(matrix, full_matrices=False) for matrix in (w0, w))
            intruders = np.abs(u[:, :10].T @ u0).max(axis=1) < 0.5
            scaled = u[:, :10][:, intruders] * s[:10][intruders] @ vt[:10][intruders]
            changes[f"{i}.weight"] = np.linalg.norm((0.5 - 1) * scaled) / np.linalg.norm(w)
        return {"changes": changes, "truncation": {}}

    def refusals(self):
        return [(ValueError, "scale", lambda: reduce_intruders(plain(), plain(), scale=-1.0))]


def test_tied_weights_are_changed_once():
    base, tuned = plain(), tuned_plain()
    for model in (base, tuned):
        model.append(nn.ReLU()).append(nn.Linear(14, 20))
        model[4].weight = model[0].weight
    want = scale_intruders(base[0].weight, tuned[0].weight, scale=0.5)
    changes = reduce_intruders(base, tuned, scale=0.5)
    assert torch.equal(tuned[0].weight, want)
    assert changes["4.weight"] == changes["0.weight"] > 0


def peft_pair(**config):
    peft = pytest.importorskip("peft", reason="the peer's function and adapters are tested where PEFT is installed")
    base = plain().double()
    tuned = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(**{"r": 3, "lora_alpha": 6, "target_modules": ["0", "2"], **config})
    ).double()
    with torch.no_grad():
        for i in (0, 2):
            layer = tuned.base_model.model[i]
            _, A, B = factors(*layer.base_layer.weight.shape, seed=i)
            layer.lora_A["default"].weight.copy_(A)
            layer.lora_B["default"].weight.copy_(B)
    return base, tuned


def test_peft_model_equals_pefts_own_function():
    base, tuned = peft_pair()
    from peft.tuners.lora.intruders import reduce_intruder_dimension

    peer = copy.deepcopy(tuned)
    reduce_intruder_dimension(peer, mitigation_lambda=0.75, logging_sink=None)
    frozen = tuned.base_model.model[0].base_layer.weight.clone()
    before = {k: v.clone() for k, v in weights_of(tuned).items()}
    changes = reduce_intruders(base, tuned)
    assert set(changes.truncation) == {"0.weight", "2.weight"}
    for i in (0, 2):
        ours = tuned.base_model.model[i].get_delta_weight("default")
        theirs = peer.base_model.model[i].get_delta_weight("intruder_reduced")
        assert (ours - theirs).abs().max() <= 1e-8 * theirs.abs().max()
        name, b = f"{i}.weight", base[i].weight
        want = scale_intruders(b, before[name]) - b
        assert changes.truncation[name] == pytest.approx(((ours - want).norm() / want.norm()).item(), rel=1e-6)
        assert changes[name] == pytest.approx(((b + ours - before[name]).norm() / before[name].norm()).item(), rel=1e-6)
        assert 0 < changes[name] < 1
    assert torch.equal(tuned.base_model.model[0].base_layer.weight, frozen)
    assert intruder_dimensions(base, tuned).total <= intruder_dimensions(base, peft_pair()[1]).total


def test_peft_over_conv1d():
    conv1d = pytest.importorskip("transformers.pytorch_utils", reason="Conv1D is transformers'").Conv1D
    peft = pytest.importorskip("peft", reason="adapters of PEFT are tested where it is installed")
    block, (w, A, B) = nn.ModuleDict({"c_fc": conv1d(20, 14)}).double(), factors()
    with torch.no_grad():
        block["c_fc"].weight.copy_(w.T)
    base = {"c_fc.weight": w}
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["c_fc"], fan_in_fan_out=True)
    tuned = peft.get_peft_model(copy.deepcopy(block), config).double()
    layer = tuned.base_model.model["c_fc"]
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(A)
        layer.lora_B["default"].weight.copy_(B)
    reduce_intruders(block, tuned)
    A2, B2 = scale_intruders_lora(w, A, B, scaling=2.0)
    assert torch.allclose(layer.get_delta_weight("default"), (2 * B2 @ A2).T, atol=1e-12)
    turned = {"c_fc.weight": (w + 2 * B @ A).clone()}
    plain_block = copy.deepcopy(block)
    with torch.no_grad():
        plain_block["c_fc"].weight.copy_(turned["c_fc.weight"].T)
    reduce_intruders(block, plain_block)
    assert torch.allclose(plain_block["c_fc"].weight.T, scale_intruders(base["c_fc.weight"], turned["c_fc.weight"]), atol=1e-12)


def test_what_cannot_be_reduced_is_refused(tmp_path):
    base, A, B = factors()
    dora, merged, two = (peft_pair(**kw) for kw in ({"use_dora": True}, {}, {}))
    merged[1].merge_adapter()
    two[1].add_adapter("second", two[1].peft_config["default"])
    two[1].base_model.set_adapter(["default", "second"])
    adapted = plain()

    class Adapted(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.base, self.update = layer, nn.Identity()

        def merged(self):
            return self.base

    adapted[0] = Adapted(adapted[0])
    wrong_shape = {"0.weight": torch.ones(20, 13), "2.weight": torch.ones(14, 20)}
    refuses(
        [
            (ValueError, "scaling must not be 0", lambda: scale_intruders_lora(base, A, B, scaling=0.0)),
            (ValueError, "B (out, r); got", lambda: scale_intruders_lora(base, B, A, scaling=1.0)),
            (ValueError, "threshold", lambda: scale_intruders_lora(base, A, B, scaling=1.0, threshold=2.0)),
            (ValueError, "tuned weight has NaN", lambda: scale_intruders_lora(base, A * float("nan"), B, scaling=1.0)),
            (TypeError, "changed in place", lambda: reduce_intruders(plain(), tmp_path)),
            (TypeError, "layer 0.weight", lambda: reduce_intruders(*dora)),
            (TypeError, "merge it first", lambda: reduce_intruders(*merged)),
            (TypeError, "one active", lambda: reduce_intruders(*two)),
            (TypeError, "lowdim adapter", lambda: reduce_intruders(plain(), adapted)),
            (ValueError, "layer 0.weight", lambda: reduce_intruders(plain(), wrong_shape)),
            (ValueError, "scale", lambda: reduce_intruders(plain(), plain(), scale=-1.0)),
        ]
    )

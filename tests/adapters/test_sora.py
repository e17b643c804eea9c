import copy
import json
import math

import pytest
import torch
from adapter_vectors import layer_of
from torch import nn

import lowdim
import vectors
from lowdim.adapters import AdaptedLayer, SoRA
from lowdim.adapters.core.shared import StepCounter
from lowdim.adapters.sora import SoRAAdapted, SoRAUpdate
from lowdim.files import read_tensors
from lowdim.plan.kept import kept_bytes
from lowdim.testing.adapter_case import AdapterCase
from lowdim.testing.closeness import relative_error
from lowdim.testing.sample_layers import make_input, make_layer
from lowdim.testing.small_model import sample_input, small_model


class TestSoRA(AdapterCase):
    rank, alpha = 3, 7

    def method(self, **changes):
        return SoRA(**{"rank": self.rank, "alpha": self.alpha, **changes})

    def dense(self, update):
        return self.alpha / self.rank * update.B @ torch.diag(update.gate) @ update.A

    def start(self, weight, stats):
        return {"B": 0.0}

    def max_delta_rank(self, out_features, in_features):
        return 3


def single(**options):
    method = SoRA(**{"rank": 4, **options})
    return lowdim.adapt(nn.Sequential(nn.Linear(6, 5)), method)


def update_of(adapted):
    return adapted.layers["0"].update


def test_vectors_of_the_threshold_operator():
    case = vectors.load("sora", "prox")
    for name in ("official", "soft"):
        update = SoRA(rank=64, proximal=name).attach(nn.Linear(64, 64, dtype=torch.float64)).update
        for row, t in enumerate(case["t"].tolist()):
            with torch.no_grad():
                update.gate.copy_(case["gate"])
            update.proximal_step(t)
            case.close(update.gate, case[name][row])


def test_vectors_of_the_schedule():
    case = vectors.load("sora", "schedule")
    for name in ("linear", "log_linear", "exp_linear"):
        case.close(torch.tensor(SoRA(schedule=name, **case.hyperparameters).thresholds(), dtype=torch.float64), name)


def test_vectors_of_the_dynamics():
    case = vectors.load("sora", "dynamics")
    how = case.hyperparameters
    case.tensors["W"] = case["W0"]
    names = ("rank", "alpha", "threshold", "sparse_lambda", "proximal")
    method = SoRA(**{name: how[name] for name in names})
    # The case has rank 8 on a (6, 9) layer, which attaching would refuse.
    update = SoRAUpdate(6, 9, 8, 16 / 8, proximal="official", dtype=torch.float64, device="cpu")
    layer = AdaptedLayer(layer_of(case), update)
    adapted = SoRAAdapted(nn.Sequential(layer), method, {"0": layer}, {}, (), 0, shared=StepCounter())
    with torch.no_grad():
        for name, start in (("A", "A0"), ("B", "B0"), ("gate", "gate0")):
            getattr(update, name).copy_(case[start])
    others, gates = adapted.param_groups(how["lr_ab"])
    assert [id(p) for p in gates["params"]] == [id(update.gate)]
    sgd = torch.optim.SGD([others])
    adam = torch.optim.Adam([{**gates, "lr": how["lr_gate"]}], betas=how["betas"], eps=how["eps"])
    losses, rows = [], []
    for _ in range(how["steps"]):
        loss = (adapted.model(case["x"]) - case["target"]).square().mean() + adapted.regularizer()
        losses.append(loss.detach())
        adapted.model.zero_grad()
        loss.backward()
        sgd.step()
        adam.step()
        adapted.step(adam)
        rows.append(update.gate.detach().clone())
    case.close(torch.stack(losses), "losses")
    case.close(torch.stack(rows), "gates")
    case.close(update.A, "A")
    case.close(update.B, "B")
    case.close(adapted.layers["0"].delta(), "delta")
    assert any(bool((row == 0).any()) for row in rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("proximal", "want"),
    [
        # below t, exactly t, between t and 2t, exactly 2t, above
        ("official", [0.0, 0.0, 0.5, 0.0, 0.5, 1.5, -1.5]),
        ("soft", [0.0, 0.0, 0.0, 0.25, 0.5, 1.5, -1.5]),
    ],
)
def test_the_two_operators_differ_between_t_and_2t(proximal, want, dtype):
    update = SoRA(rank=7, proximal=proximal).attach(nn.Linear(8, 8, dtype=dtype)).update
    with torch.no_grad():
        update.gate.copy_(torch.tensor([0.0, -0.25, 0.5, 0.75, 1.0, 2.0, -2.0]))
    update.proximal_step(0.5)
    assert torch.equal(update.gate, torch.tensor(want, dtype=dtype))
    update.proximal_step(0.0)
    assert torch.equal(update.gate, torch.tensor(want, dtype=dtype))


def test_a_gate_that_is_not_a_number_stays_so():
    for proximal in ("official", "soft"):
        update = SoRA(rank=1, proximal=proximal).attach(nn.Linear(2, 2)).update
        with torch.no_grad():
            update.gate.fill_(math.nan)
        update.proximal_step(0.1)
        assert bool(update.gate.isnan())


def test_the_threshold_grows_with_the_calls_and_survives_a_trainers_checkpoint(tmp_path):
    options = {"threshold": 0.1, "max_threshold": 0.3, "num_thresholds": 3, "schedule": "linear", "schedule_interval": 2}
    adapted = single(**options)

    def falls(adapted, calls):
        sizes = []
        for _ in range(calls):
            update = update_of(adapted)
            with torch.no_grad():
                update.gate.fill_(5.0)
            adapted.step()
            sizes.append(5 - float(update.gate.detach()[0]))
        return sizes

    want = [0.1, 0.1, 0.2, 0.2, 0.3, 0.3, 0.3]
    assert falls(adapted, 3) == pytest.approx(want[:3], rel=1e-5)
    fresh = single(**options)
    fresh.model.load_state_dict(copy.deepcopy(adapted.model.state_dict()))
    adapted.save(tmp_path)
    loaded = lowdim.load_adapter(_plain_of(adapted), tmp_path)
    for other in (adapted, fresh, loaded):
        assert falls(other, 4) == pytest.approx(want[3:], rel=1e-5)


def _plain_of(adapted):
    layer = nn.Linear(6, 5)
    layer.load_state_dict(adapted.layers["0"].base.state_dict())
    return nn.Sequential(layer)


def test_the_regularizer_is_a_mean_over_the_gates_of_all_layers_zeros_included():
    adapted = lowdim.adapt(small_model(), SoRA(rank=3, sparse_lambda=0.5))
    gates = [layer.update.gate for layer in adapted.layers.values()]
    with torch.no_grad():
        gates[0].copy_(torch.tensor([1.0, -2.0, 0.0]))
        gates[1].copy_(torch.tensor([0.0, 0.0, 3.0]))
    loss = adapted.regularizer()
    assert float(loss.detach()) == pytest.approx(0.5 * 6 / 6)
    loss.backward()
    assert gates[0].grad.tolist() == pytest.approx([0.5 / 6, -0.5 / 6, 0.0])
    assert lowdim.adapt(small_model(), SoRA(rank=3, sparse_lambda=0.0)).regularizer() == 0.0


def test_a_closed_gate_gets_a_gradient_and_can_open_again():
    adapted = single(threshold=1e-3)
    update = update_of(adapted)
    with torch.no_grad():
        update.gate.zero_()
        update.B.normal_()
    optimizer = torch.optim.Adam(adapted.param_groups(0.1))
    assert set(adapted.effective_rank().values()) == {0}
    (adapted.model(torch.randn(20, 6)).square().mean() + adapted.regularizer()).backward()
    optimizer.step()
    adapted.step(optimizer)
    assert adapted.effective_rank() == {"0": 4}


def test_gates_have_a_group_of_their_own_without_decay():
    adapted = lowdim.adapt(small_model(), SoRA(rank=2), modules_to_save=["score"])
    gates = {id(layer.update.gate) for layer in adapted.layers.values()}
    for decay in (None, 0.1):
        others, own = adapted.param_groups(0.01, weight_decay=decay)
        assert {id(p) for p in own["params"]} == gates
        assert own["weight_decay"] == 0.0
        assert others.get("weight_decay") == decay
        assert len(others["params"]) == 2 * 2 + 2


def test_compacting_is_exact_and_keeps_the_scale(tmp_path):
    peft = pytest.importorskip("peft")
    model = small_model()
    adapted = lowdim.adapt(model, SoRA(rank=4, alpha=12))
    first, second = (layer.update for layer in adapted.layers.values())
    with torch.no_grad():
        for update in (first, second):
            update.B.normal_(generator=torch.Generator().manual_seed(1))
        first.gate.copy_(torch.tensor([0.0, 0.7, 0.0, -1.0]))
        second.gate.zero_()
    A, B = first.compact()
    assert A.shape == (2, 8)
    assert B.shape == (12, 2)
    assert relative_error(3.0 * B @ A, first.delta()) <= 1e-6
    assert [t.shape for t in second.compact()] == [(0, 12), (6, 0)]
    assert adapted.effective_rank() == {"body.first": 2, "body.second": 0}
    report = adapted.export(tmp_path)
    assert report.exact
    assert report.ranks == {"body.first": 2, "body.second": 1}  # PEFT has no rank 0
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"]  # the scale 12 / 4 is in lora_B
    tensors, _ = read_tensors(tmp_path / "adapter_model.safetensors")
    assert tensors["base_model.model.body.first.lora_A.weight"].shape == (2, 8)
    loaded = peft.PeftModel.from_pretrained(small_model(), tmp_path)
    assert relative_error(loaded(sample_input()), model(sample_input())) <= 1e-5


def test_it_keeps_no_more_for_each_row_than_lora():
    def growth(method):
        model = lowdim.adapt(nn.Sequential(nn.Linear(32, 24)), method).model
        return kept_bytes(model, torch.randn(300, 32)) - kept_bytes(model, torch.randn(100, 32))

    assert growth(SoRA(rank=4)) == growth(lowdim.adapters.LoRA(rank=4))


def test_merging_ends_the_schedule_quietly():
    adapted = single()
    adapted.merge()
    adapted.step()
    assert adapted.regularizer() == 0.0


def test_an_embedding_is_adapted():
    layer = make_layer("embedding")
    adapted = SoRA(rank=3).attach(layer)
    with torch.no_grad():
        adapted.update.B.normal_()
    ids = make_input(layer)
    assert relative_error(adapted(ids), adapted.merged()(ids)) <= 1e-12


@pytest.mark.parametrize(
    ("name", "values"),
    {
        "rank": [0, 2.0],
        "alpha": [0, -1.0],
        "threshold": [-1e-9, math.nan],
        "sparse_lambda": [-1.0, math.inf],
        "schedule": ["cosine", [1e-3, 1e-2]],
        "proximal": ["hard", None],
        "num_thresholds": [0],
        "schedule_interval": [0],
        "max_threshold": [-1.0],
    }.items(),
)
def test_bad_input(name, values):
    for value in values:
        with pytest.raises(ValueError, match=name):
            SoRA(**{name: value})


def test_a_logarithm_needs_thresholds_above_zero():
    with pytest.raises(ValueError, match=r"threshold .*\(0"):
        SoRA(schedule="exp_linear", threshold=0.0)
    with pytest.raises(ValueError, match="max_threshold"):
        SoRA(schedule="exp_linear", max_threshold=0.0)
    with pytest.raises(ValueError, match="max_threshold"):
        SoRA(schedule="log_linear", max_threshold=1e4)  # its exponential overflows
    assert SoRA(schedule="linear", threshold=0.0, max_threshold=1e4, num_thresholds=1).thresholds() == [0.0]

"""Learning rates by layer: their formulas, the parameter groups, and the companion."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import vectors
from lowdim.companion import RateFactor
from lowdim.diagnose import TempBalance, balance_groups, balanced_lrs, farms, prune, pruning_ratios
from lowdim.testing.result_case import ValueCase

CASE = vectors.load("farms", "assignment")


def net(layers=4):
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(12, 12) for _ in range(layers)))


def trained(model, optimizer, steps, after=lambda: None):
    g = torch.Generator().manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 12, generator=g)).square().mean().backward()
        optimizer.step()
        after()


class TestBalancedRates(ValueCase):
    def alphas(self):
        return [3.0, 2.0, 2.5, 4.0]

    def result(self):
        return np.array(
            [balanced_lrs(self.alphas(), 0.2, method=m, low=0.6, high=1.4) for m in ("linear", "sqrt", "log2", "step")]
        )

    def expected(self):
        a = np.array(self.alphas())
        linear = 0.2 * (0.6 + 0.8 * (a - 2) / 2)
        root, log = np.sqrt(a), np.log2(a)
        step = 0.2 * (0.6 + 0.8 * np.array([2, 0, 1, 3]) / 4)
        return np.array([linear, root / root.mean() * 0.2, log / log.mean() * 0.2, step])

    def refusals(self):
        return [
            (ValueError, "lr must", lambda: balanced_lrs([2.0], 0.0)),
            (ValueError, "alphas", lambda: balanced_lrs([], 0.1)),
            (ValueError, "alphas", lambda: balanced_lrs([2.0, np.nan], 0.1)),
            (ValueError, "above 1", lambda: balanced_lrs([0.9, 2.0], 0.1, method="log2")),
            (ValueError, "high", lambda: balanced_lrs([2.0], 0.1, low=1.5, high=0.5)),
            (ValueError, "method", lambda: balanced_lrs([2.0], 0.1, method="square")),  # type: ignore[arg-type]
        ]

    @pytest.mark.parametrize("method", ["linear", "sqrt", "log2", "step"])
    def test_the_authors_numbers(self, method):
        h = CASE.hyperparameters
        got = balanced_lrs(CASE["alphas"].tolist(), h["lr"], method=method, low=h["low"], high=h["high"])
        CASE.close(torch.as_tensor(got), f"lr.{method}")
        assert balanced_lrs([3.0, 3.0], 0.1, method=method).tolist() == [0.1, 0.1]


class TestPruningRatios(ValueCase):
    def result(self):
        return pruning_ratios([2.0, 4.0, 3.0, 3.0, 6.0, 4.0], [10, 20, 30, 40, 50, 60], 0.5, epsilon=0.3, block=2)

    def expected(self):
        a = np.array([3, 3, 3, 3, 5, 5.0])
        q = 0.7 + 0.6 * (a - 3) / 2
        sizes = np.array([10, 20, 30, 40, 50, 60])
        return q * 0.5 * sizes.sum() / (sizes * q).sum()

    def refusals(self):
        model = nn.Linear(4, 4)
        return [
            (ValueError, "sparsity", lambda: pruning_ratios([2.0], [1], 1.0)),
            (ValueError, "block must divide the 3", lambda: pruning_ratios([2.0, 2.0, 2.0], [1, 1, 1], 0.5, block=2)),
            (ValueError, "one number for each layer", lambda: pruning_ratios([2.0, 3.0], [1], 0.5)),
            (ValueError, "sizes", lambda: pruning_ratios([2.0, 3.0], [1, 0], 0.5)),
            (ValueError, "epsilon", lambda: pruning_ratios([2.0], [1], 0.5, epsilon=1.0)),
            (ValueError, "nearest: weight", lambda: prune(model, {"wight": 0.5})),
            (ValueError, "ratio of weight", lambda: prune(model, {"weight": 1.5})),
        ]

    def test_the_authors_numbers(self):
        h = CASE.hyperparameters
        alphas, sizes = CASE["alphas"].tolist(), CASE["sizes"].tolist()
        got = pruning_ratios(alphas, sizes, h["sparsity"], epsilon=h["epsilon"], block=h["block"])
        CASE.close(torch.tensor(got, dtype=torch.float64), "ratios")

    def test_caps_and_equal_exponents(self):
        assert pruning_ratios([3.0, 3.0], [5, 9], 0.4) == [0.4, 0.4]
        assert pruning_ratios([2.0, 9.0], [10, 10], 0.9, epsilon=0.5)[1] == 0.998

    def test_the_smallest_become_zero(self):
        model = net(2)
        before = model[1].weight.detach().clone()
        bias = model[1].bias.detach().clone()
        assert prune(model, {"1.weight": 0.3}) is model
        gone = model[1].weight == 0
        assert int(gone.sum()) == int(144 * 0.3)
        assert float(before[gone].abs().max()) <= float(before[~gone].abs().min())
        assert torch.equal(model[1].weight[~gone], before[~gone])
        assert torch.equal(model[1].bias, bias)


class Conv(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.fc = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 8)
        self.norm, self.attention = nn.LayerNorm(8), nn.MultiheadAttention(8, 2)


def test_groups():
    model = Conv()
    groups = balance_groups(model, weight_decay=0.1)
    members = {group.get("layer"): {id(p) for p in group["params"]} for group in groups}
    assert members["conv1.weight"] == {id(p) for part in (model.conv1, model.bn1) for p in part.parameters()}
    assert members["attention.in_proj_weight"] == {id(model.attention.in_proj_weight), id(model.attention.in_proj_bias)}
    assert members["attention.out_proj.weight"] == {id(p) for p in model.attention.out_proj.parameters()}
    assert members[None] == {id(p) for p in model.norm.parameters()}
    assert all(group["weight_decay"] == 0.1 for group in groups)
    assert sum(map(len, members.values())) == len(list(model.parameters()))
    without = balance_groups(model, exclude=["fc"])
    assert len(without) == len(groups) - 1
    with pytest.raises(ValueError, match="no weight of this model is trained"):
        balance_groups(model.requires_grad_(False))


def test_groups_of_an_adapted_model():
    from lowdim import adapt
    from lowdim.adapters import LoRA

    model = net(3)
    adapt(model, LoRA(rank=2, target_modules=["0", "2"]))
    groups = {group["layer"]: len(group["params"]) for group in balance_groups(model)}
    assert groups == {"0.weight": 2, "2.weight": 2}


def test_groups_of_a_peft_model():
    peft = pytest.importorskip("peft", reason="adapters of PEFT are tested where it is installed")
    model = peft.get_peft_model(net(3), peft.LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"]))
    groups = {group["layer"]: len(group["params"]) for group in balance_groups(model)}
    assert groups == {"0.weight": 2, "2.weight": 2}


@pytest.mark.parametrize("wrapped", [False, True])
def test_factors_act_within_the_step_under_a_scheduler(wrapped):
    model = net()
    optimizer = torch.optim.SGD(balance_groups(model), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    outer = type("Accelerated", (), {"optimizer": optimizer})() if wrapped else optimizer
    balance = TempBalance(model, outer, rows=8, windows=2)
    before = [layer.weight.detach().clone() for layer in model]
    model(torch.ones(2, 12)).sum().backward()
    balance.update()
    alphas = farms(model, rows=8, windows=2).alphas
    inner = [alphas["1.weight"], alphas["2.weight"]]
    want = dict(zip(("1.weight", "2.weight"), (0.5, 1.5) if inner[0] < inner[1] else (1.5, 0.5)))
    assert balance.factors == want
    optimizer.step()
    for i, layer in enumerate(model):
        moved = before[i] - 0.1 * want.get(f"{i}.weight", 1.0) * layer.weight.grad
        assert torch.allclose(layer.weight, moved)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1] * 4
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.05] * 4
    balance.remove()
    before = model[1].weight.detach().clone()
    optimizer.step()
    assert torch.allclose(model[1].weight, before - 0.05 * model[1].weight.grad)


def test_resume_gives_the_same_bits():
    def start():
        model = net()
        optimizer = torch.optim.AdamW(balance_groups(model), lr=0.01)
        return model, optimizer, TempBalance(model, optimizer, interval=2, rows=8, windows=2, skip_last=False)

    model, optimizer, balance = start()
    trained(model, optimizer, 3, balance.step)
    kept = copy.deepcopy((model.state_dict(), optimizer.state_dict(), balance.state_dict()))
    early = balance.factors
    again, its, other = start()
    again.load_state_dict(kept[0])
    its.load_state_dict(kept[1])
    other.load_state_dict(kept[2])
    assert other.factors == balance.factors
    assert len(other.factors) == 3
    for one, two in ((model, (optimizer, balance)), (again, (its, other))):
        trained(one, two[0], 3, two[1].step)
    assert balance.factors == other.factors != early
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    with pytest.raises(ValueError, match=r"9\.weight"):
        balance.load_state_dict({"factors": {"9.weight": 1.0}, "count": 0})


def test_what_balance_refuses():
    model = net(2)
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    grouped = torch.optim.SGD(balance_groups(model), lr=0.1)
    with pytest.raises(ValueError, match="balance_groups"):
        TempBalance(model, plain)
    with pytest.raises(ValueError, match="skip_first=False"):
        TempBalance(model, grouped)
    with pytest.raises(ValueError, match="interval"):
        TempBalance(net(3), torch.optim.SGD(balance_groups(net(3)), lr=0.1), interval=0)
    with pytest.raises(TypeError, match="nearest: rows"):
        TempBalance(net(3), torch.optim.SGD(balance_groups(net(3)), lr=0.1), row=8)


def test_a_list_of_factors_must_fit_the_groups():
    model = net(2)
    optimizer = torch.optim.SGD(balance_groups(model), lr=0.1)
    RateFactor(optimizer, lambda: [1.0])
    with pytest.raises(ValueError, match="each of the 2 parameter groups; got 1"):
        optimizer.step()


def test_trainer_callback(tmp_path):
    transformers = pytest.importorskip("transformers", reason="the callback is transformers'")
    pytest.importorskip("accelerate", reason="its trainer needs accelerate")
    from lowdim.train import TempBalanceCallback

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = net()

        def forward(self, x):
            return {"loss": self.body(x).square().mean()}

    def trainer(folder):
        model = Model()
        optimizer = torch.optim.AdamW(balance_groups(model), lr=0.01)
        args = transformers.TrainingArguments(
            str(tmp_path / folder),
            num_train_epochs=2,
            per_device_train_batch_size=4,
            save_strategy="epoch",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        callback = TempBalanceCallback(model, rows=8, windows=2)
        data = [{"x": row} for row in torch.randn(8, 12, generator=torch.Generator().manual_seed(2))]
        made = transformers.Trainer(model, args, train_dataset=data, optimizers=(optimizer, None), callbacks=[callback])
        return made, model, callback

    whole, model, callback = trainer("one")
    whole.train()
    assert sorted(callback.balance.factors) == ["body.1.weight", "body.2.weight"]
    halfway = str(tmp_path / "one" / "checkpoint-2")
    assert (tmp_path / "one" / "checkpoint-2" / "balance.json").is_file()
    resumed, again, _ = trainer("one")
    resumed.train(resume_from_checkpoint=halfway)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    elsewhere, other, _ = trainer("two")
    with pytest.warns(UserWarning, match="balance.json"):
        elsewhere.train(resume_from_checkpoint=halfway)
    # At the end of an epoch they are what was measured.
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))

"""Which parameters `param_groups` projects."""

import logging

import pytest
import torch
from torch import nn

from lowdim.optim import GaLore, param_groups, state_bytes


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.position = nn.Parameter(torch.zeros(5, 8))
        self.attention = nn.MultiheadAttention(8, 2)
        self.norm = nn.LayerNorm(8)
        self.conv = nn.Conv2d(3, 4, 3)
        self.small = nn.Linear(8, 2)
        self.first = nn.Linear(8, 16)
        self.second = nn.Linear(8, 16)
        self.second.weight = self.first.weight
        self.inner_tied = nn.Linear(8, 20, bias=False)
        self.inner_tied.weight = self.embed.weight
        self.lm_head = nn.Linear(8, 20, bias=False)
        self.frozen = nn.Linear(8, 16)
        self.frozen.requires_grad_(False)


def test_sorting():
    model = Tied()
    groups = param_groups(model, rank=4, scale=0.5, rest={"lr": 0.01})
    assert [g["rank"] for g in groups] == [4, None]
    assert groups[0]["scale"] == 0.5
    assert groups[1]["lr"] == 0.01
    projected = {id(p) for p in groups[0]["params"]}
    assert projected == {id(model.first.weight), id(model.attention.in_proj_weight), id(model.attention.out_proj.weight)}
    everything = [id(p) for g in groups for p in g["params"]]
    assert len(everything) == len(set(everything))
    assert set(everything) == {id(p) for p in model.parameters() if p.requires_grad}
    why = {name: group for name, _, group in groups.rows}
    assert why["embed.weight = inner_tied.weight"] == "embedding"
    assert why["first.weight = second.weight"] == "rank 4"
    assert why["small.weight"].startswith("smaller side")
    assert why["lm_head.weight"].startswith("head")
    assert why["position"].startswith("head or not targeted")
    assert why["conv.weight"] == "not a matrix"
    assert why["norm.weight"] == "vector"
    assert f"{sum(p.numel() for p in groups[0]['params']):,} of" in groups.describe()
    GaLore(groups, lr=0.1)


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("sides", [(5, 9), (9, 5)])
def test_sorting_projects_above_the_rank(sides, rank):
    groups = param_groups(nn.Sequential(nn.Linear(*sides, bias=False)), rank=rank)
    assert [g["rank"] for g in groups] == [rank]


@pytest.mark.parametrize("rank", [5, 6])
@pytest.mark.parametrize("sides", [(5, 9), (9, 5)])
def test_sorting_leaves_what_would_save_nothing(sides, rank):
    """At the rank the subspace is the whole space."""
    with pytest.warns(UserWarning, match="no parameter"):
        groups = param_groups(nn.Sequential(nn.Linear(*sides, bias=False)), rank=rank)
    assert [g["rank"] for g in groups] == [None]
    assert groups.rows == [("0.weight", (sides[1], sides[0]), f"smaller side not above rank {rank}")]


def test_order_of_tied_names_does_not_matter():
    """The head first, the layer second: still not projected."""
    net = nn.Sequential()
    net.add_module("lm_head", nn.Linear(8, 8))
    net.add_module("body", nn.Linear(8, 8))
    net.body.weight = net.lm_head.weight
    net.add_module("other", nn.Linear(8, 8))
    groups = param_groups(net, rank=2)
    assert [id(p) for p in groups[0]["params"]] == [id(net.other.weight)]


def test_target_modules():
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    groups = param_groups(net, rank=2, target_modules=["1"])
    assert [id(p) for p in groups[0]["params"]] == [id(net[1].weight)]
    with pytest.raises(ValueError, match="nope"):
        param_groups(net, rank=2, target_modules=["nope"])


def test_messages(capsys, caplog):
    net = nn.Sequential(nn.Linear(8, 8))
    with caplog.at_level(logging.INFO, "lowdim.optim"):
        param_groups(net, rank=2)
    assert "rank 2" in caplog.text
    assert capsys.readouterr().out == ""
    param_groups(net, rank=2, verbose=True)
    assert "rank 2" in capsys.readouterr().out
    with pytest.warns(UserWarning, match="no parameter"):
        groups = param_groups(net, rank=8)
    assert [g["rank"] for g in groups] == [None]
    with pytest.raises(ValueError, match="rank"):
        param_groups(net, rank=0)
    with pytest.raises(ValueError, match="requires_grad"):
        param_groups(net.requires_grad_(False), rank=2)


def test_a_model_without_linear_layers_is_left_unprojected():
    with pytest.warns(UserWarning, match="no parameter"):
        groups = param_groups(nn.Embedding(9, 8), rank=2)
    assert len(groups) == 1


@pytest.mark.models
def test_transformers_models():
    """GPT-2's Conv1D matrices are projected; its tied head is not."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=50, n_positions=8)
    model = transformers.GPT2LMHeadModel(config)
    groups = param_groups(model, rank=4)
    names = sorted(name for name, _, group in groups.rows if group == "rank 4")
    want = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    assert names == [f"transformer.h.0.{n}.weight" for n in want]
    assert any("lm_head.weight" in name and group == "embedding" for name, _, group in groups.rows)


@pytest.mark.models
@pytest.mark.slow
def test_trainer_saves_and_resumes(tmp_path):
    """transformers.Trainer with a scheduler: the loss falls, and a resumed run ends at the same bits."""
    transformers = pytest.importorskip("transformers")

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))

        def forward(self, x, labels):
            out = self.body(x)
            return {"loss": (out - labels).square().mean(), "logits": out}

    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    rows = [{"x": row, "labels": row.flip(0)} for row in x]

    def trainer(folder, total):
        torch.manual_seed(0)
        model = Net()
        optimizer = GaLore(param_groups(model, rank=4), lr=0.3, update_interval=4)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 12)
        arguments = transformers.TrainingArguments(
            output_dir=str(folder), max_steps=total, per_device_train_batch_size=8, gradient_accumulation_steps=2, save_steps=6,
            logging_steps=1, report_to=[], disable_tqdm=True, use_cpu=True, seed=0, remove_unused_columns=False,
        )  # fmt: skip
        return transformers.Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, schedule))

    whole = trainer(tmp_path / "a", 12)
    whole.train()
    losses = [row["loss"] for row in whole.state.log_history if "loss" in row]
    assert losses[-1] < 0.8 * losses[0]
    resumed = trainer(tmp_path / "a", 12)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-6"))
    for p, q in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_state_bytes_counts_other_optimizers_too():
    p = nn.Parameter(torch.zeros(10))
    p.grad = torch.ones(10)
    optimizer = torch.optim.AdamW([p])
    assert state_bytes(optimizer) == 0
    optimizer.step()
    assert state_bytes(optimizer) == 84  # two moments and a float32 step

"""Training of bfloat16 weights through every strategy: small updates are kept, as forecast, and resumed to the same bits."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import tiny
from lowdim import methods
from lowdim.catalogue import variant
from lowdim.methods import Setup
from lowdim.methods.strategy import adamw
from lowdim.optim import AdamW
from lowdim.plan import forecast
from lowdim.train.recipes import load_recipe
from lowdim.train.run import run_recipe

RATE = 1e-4  # a bfloat16 between 1 and 2 has steps of 1/128


class Ones(nn.Module):
    """Linear layers whose weights are about 1 and 1.5, far from a bfloat16's resolution at this rate."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(64, 64), nn.Linear(64, 64)
        with torch.no_grad():
            for p in self.parameters():
                p.fill_(1.5)

    def forward(self, x):
        return self.head(self.body(x))


def change(name, dtype, **how):
    """The mean change of each trained parameter of at least 500 entries over 60 steps of constant gradients."""
    model = Ones().to(dtype)
    setup = {"lr": RATE, "steps": 60, "head": ("head",) if name == "linear-probe" else (), **how}
    options = {"rank": 8} if "rank" in methods.strategy_for(variant(name)).option_names() else {}
    applied = methods.apply(methods.with_options(variant(name), options), model, **setup)
    optimizer = applied.start(RATE)
    trained = [p for p in applied.model.parameters() if p.requires_grad and p.numel() >= 500]
    assert trained
    with torch.no_grad():
        for p in trained:
            p.fill_(1.5)
    for _ in range(60):
        for p in trained:
            p.grad = torch.ones_like(p)
        optimizer.step()
        optimizer.zero_grad()
    if how.get("master_weights"):
        return [float((optimizer.state[p]["master"] - 1.5).mean()) for p in trained]
    return [float((p.detach().float() - 1.5).mean()) for p in trained]


@pytest.mark.parametrize("master_weights", [False, True])
@pytest.mark.parametrize("name", ["full", "linear-probe", "monarch", "low-rank"])
def test_every_strategy_keeps_small_updates(name, master_weights):
    got = change(name, torch.bfloat16, master_weights=master_weights)
    assert got == pytest.approx(change(name, torch.float32), rel=0.1)
    assert got[0] == pytest.approx(-60 * RATE, rel=0.1)


def test_an_adapters_head_keeps_small_updates():
    model = Ones().to(torch.bfloat16)
    applied = methods.apply(methods.with_options(variant("lora"), {"rank": 2}), model, lr=RATE, steps=60, head=("head",))
    optimizer = applied.start(RATE)
    assert isinstance(optimizer, AdamW)
    weight = model.head.weight
    for _ in range(60):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert float((weight.detach().float() - 1.5).mean()) == pytest.approx(-60 * RATE, rel=0.1)


def test_float32_is_trained_by_torch():
    setup = Setup(lr=RATE, steps=1, master_weights=True)
    assert type(adamw(Ones().parameters(), RATE, setup)) is torch.optim.AdamW
    one_of_many = [{"params": [nn.Parameter(torch.zeros(2))]}, {"params": [nn.Parameter(torch.zeros(2, dtype=torch.float16))]}]
    assert isinstance(adamw(one_of_many, RATE, setup), AdamW)


@pytest.mark.parametrize("name", ["full", "galore"])
def test_rounding_follows_the_runs_seed(name):
    ends = []
    for seed in (0, 0, 1):
        torch.manual_seed(0)
        model = tiny.llama().bfloat16()
        applied = methods.apply(methods.with_options(variant(name), {}), model, lr=RATE, steps=2, seed=seed)
        optimizer = applied.start(RATE)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


# --- forecasts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "more"), [("full", 8), ("lora", 8), ("galore", 4)])
def test_forecasts_count_the_masters(name, more):
    """AdamW: 4 bytes for the master, and 4 for wider moments; GaLore's moments are float32 in any case."""

    def build():
        return nn.Sequential(*(nn.Linear(256, 256, dtype=torch.bfloat16) for _ in range(2)))

    how = {"batch": lambda: torch.ones(2, 256, dtype=torch.bfloat16), "loss_fn": lambda m, x: m(x).sum()}
    found = [forecast(build, name, dtype=torch.bfloat16, master_weights=masters, **how) for masters in (False, True)]
    trained = found[0].trained_parameters
    assert found[1].optimizer_state - found[0].optimizer_state == more * trained


def test_plan_refuses_masters_of_float32():
    from lowdim.jobs import PlanSettings

    with pytest.raises(ValueError, match=r"--master-weights is for 16-bit weights; got --dtype float32"):
        PlanSettings(model="stories260k", master_weights=True)


# --- recipes -------------------------------------------------------------------------------------------------------------

RECIPE = """
model: stories260k
task: causal-lm
method: {method}
data: lowdim:shakespeare
limit: 16
max_length: 16
steps: 6
batch_size: 2
lr: 1e-4
dtype: bfloat16
save_steps: 2
master_weights: {masters}
out: {out}
"""


class Stop(Exception):
    pass


def _stop_at(step):
    from transformers import TrainerCallback

    class Callback(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == step:
                raise Stop

    return Callback()


@pytest.mark.parametrize("masters", ["false", "true"])
@pytest.mark.parametrize("method", ["full", *(pytest.param(name, marks=pytest.mark.slow) for name in ("lora", "galore"))])
def test_killed_and_resumed_to_the_same_bits(method, masters, tmp_path):
    made = []
    for name, stop in (("whole", None), ("killed", 3)):
        path = tmp_path / f"{name}.yaml"
        path.write_text(RECIPE.format(method=method, masters=masters, out=tmp_path / name))
        if stop:
            with pytest.raises(Stop):
                run_recipe(load_recipe(path), callbacks=(_stop_at(stop),))
        record = run_recipe(load_recipe(path), resume=stop is not None)
        file = next(p for p in (tmp_path / name).glob("*/*.safetensors"))
        made.append((record["losses"], load_file(file)))
    assert made[0][0] == made[1][0]
    assert all(torch.equal(tensor, made[1][1][key]) for key, tensor in made[0][1].items())


def test_a_recipe_refuses_masters_of_float32(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(method="full", masters="true", out="x").replace("bfloat16", "float32"))
    with pytest.raises(ValueError, match=r"master_weights: .*needs dtype: bfloat16"):
        load_recipe(path)

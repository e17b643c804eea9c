"""Compression while training, shown on a toy: a share of each weight, drawn at random, is masked step by step."""

import dataclasses
from dataclasses import dataclass, field

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import tiny
from killing import Kill
from lowdim import models
from lowdim.catalogue import Entry, Variant, variant
from lowdim.catalogue.rows import ROWS
from lowdim.compress import Scheduled
from lowdim.errors import LowdimError, UnknownNameError, check_float
from lowdim.jobs.systems import described_system
from lowdim.methods import Setup, apply, strategy_for, with_options
from lowdim.modules import MaskedLinear
from lowdim.plan import forecast, measure, shows
from lowdim.surgery import find_layers, freeze, is_linear, swap_layers
from lowdim.train.recipes import Recipe
from lowdim.train.run import run_recipe

STEPS, SHARE = 8, 0.5


class FadingLinear(MaskedLinear, Scheduled):
    """After t steps the first `share · t / total_steps` of the entries, in an order drawn from the seed, are masked."""

    def __init__(self, layer, *, share, total_steps, seed):
        super().__init__(layer)
        self.share, self.total_steps, self.seed = share, total_steps, seed
        order = torch.randperm(self.weight.numel(), generator=torch.Generator().manual_seed(seed))
        self.register_buffer("order", order.view(self.out_features, self.in_features).to(self.weight.device))
        self.start_counting()

    def mask(self):
        gone = int(self.share * min(1.0, self.finished / self.total_steps) * self.weight.numel())
        return (self.order >= gone).to(self.weight.dtype)

    def description(self):
        return {"share": self.share, "total_steps": self.total_steps, "seed": self.seed}


@dataclass(frozen=True)
class FadingConfig:
    """How a model fades.

    Attributes:
        share: of each weight's entries that are 0 at the end, in [0, 1).
        total_steps: length of the schedule; None is filled in by training.
        target_modules: which layers; None takes every linear layer but the head.
        exclude: parts of names that are left out.
        seed: of the order in which the entries go.
    """

    share: float = SHARE
    total_steps: int | None = None
    target_modules: list[str] | None = None
    exclude: tuple[str, ...] = ()
    seed: int = field(default=0)

    def __post_init__(self):
        check_float("share", self.share, 0.0, 1.0, high_open=True)


def fading(model: nn.Module, config: FadingConfig, batches=None) -> nn.Module:
    """The layers fade; their weights are trained and nothing else."""
    layers = find_layers(model, config.target_modules, exclude=config.exclude, accept=is_linear)
    how = {"share": config.share, "total_steps": config.total_steps, "seed": config.seed}
    freeze(model)
    swap_layers(model, layers, lambda _, layer: FadingLinear(layer, **how))
    for name in layers:
        model.get_submodule(name).weight.requires_grad_(True)
    return model


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    """The catalogue with the toy in it; its kind follows from the family."""
    target = f"{__name__}:fading"
    row = Entry(number=61, slug="fading", name="Fading", target=target, variants=(Variant("fading", rates=(5e-3,)),))
    monkeypatch.setattr("lowdim.catalogue.lookup.ROWS", (*ROWS, row.placed("compress")))
    return variant("fading")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """The start of the shipped sample."""
    file = tmp_path_factory.mktemp("text") / "short.txt"
    file.write_text((models.assets() / "shakespeare" / "sample.txt").read_text()[:4000])
    return str(file)


def recipe(out, text, **changes):
    how = {"steps": STEPS, "batch_size": 4, "max_length": 16, "limit": 48, "save_steps": 2, "seed": 3, **changes}
    return Recipe(model="stories260k", task="causal-lm", data=[text], method="fading", out=str(out), **how)


def zeros(weight, share=SHARE, seed=3):
    """Where the toy's weight must be 0 at the end."""
    order = torch.randperm(weight.numel(), generator=torch.Generator().manual_seed(seed))
    return (order < int(share * weight.numel())).view(weight.shape)


def test_a_run_leaves_plain_layers_whose_masks_hold_and_goes_on_after_a_kill(text, tmp_path):
    record = run_recipe(recipe(tmp_path / "whole", text))
    assert record["loss_steps"] == list(range(1, STEPS + 1))
    before = models.load_model("stories260k", "causal-lm")
    layers = find_layers(before, accept=is_linear)
    assert record["trained_parameters"] == sum(layer.weight.numel() for layer in layers.values())
    after = models.load_model(str(tmp_path / "whole" / "model"), "causal-lm")
    for name, old in before.named_parameters():
        new = after.get_parameter(name)
        if name.removesuffix(".weight") not in layers:
            assert torch.equal(new, old), f"{name} is frozen"
            continue
        assert type(after.get_submodule(name.removesuffix(".weight"))) is nn.Linear
        assert torch.equal(new == 0, zeros(new)), name
        assert not torch.equal(new[~zeros(new)], old[~zeros(old)]), f"{name} is trained"

    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe(tmp_path / "cut", text), callbacks=(Kill(5),))
    newest = tmp_path / "cut" / "checkpoints" / "checkpoint-4"
    (file,) = newest.glob("*companion*")
    assert torch.load(file, weights_only=True) == {"counts": dict.fromkeys(layers, 4)}
    again = run_recipe(recipe(tmp_path / "cut", text), resume=True)
    assert again["losses"] == record["losses"]
    one, other = (load_file(tmp_path / run / "model" / "model.safetensors") for run in ("whole", "cut"))
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def loss_of(model, batch):
    return model(**batch).loss


def test_a_forecast_is_what_training_takes(toy):
    torch.manual_seed(0)
    model, ids = tiny.llama(), torch.randint(3, 29, (16, 32))
    got = forecast(model.config, toy, task="causal-lm", batch_size=16, sequence_length=32)
    linear = set(find_layers(model, accept=is_linear))
    assert {touched.name for touched in shows(model.config, toy, task="causal-lm")} == linear
    applied = apply(toy, model.train(), lr=1e-3, steps=100)
    optimizer = applied.start(1e-3)
    batch = {"input_ids": ids, "labels": ids.clone()}

    def step():
        applied.loss(batch, loss_of).total.backward()
        optimizer.step()
        applied.after_step(optimizer)
        optimizer.zero_grad()

    real = measure(lambda: (step(), step()), model=model, optimizer=optimizer, tensors=batch.values())
    assert got.total == pytest.approx(real.bytes, rel=0.01)
    assert got.trained_parameters == applied.trained()
    applied.finish()
    assert got.file_bytes == sum(p.numel() * p.element_size() for p in model.parameters())


def test_what_is_left_open_is_filled_in_and_what_is_given_is_kept(toy):
    applied = apply(toy, tiny.llama(), lr=1e-3, steps=70, seed=4)
    layer = next(m for m in applied.model.modules() if isinstance(m, FadingLinear))
    assert (layer.total_steps, layer.seed) == (70, 4)
    assert (applied.options["total_steps"], applied.options["seed"]) == (70, 4)
    given = with_options(toy, {"total_steps": 5, "seed": 6})
    assert strategy_for(given).filled(Setup(lr=0.1, steps=70)) == {"total_steps": 5, "seed": 6}


def test_a_new_head_is_trained_whole():
    from transformers import BertConfig

    config = BertConfig(vocab_size=29, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    head = ("classifier", "bert.pooler")
    applied = apply(variant("fading"), models.build(config, "classify"), lr=1e-3, steps=2, head=head)
    faded = {name for name, m in applied.model.named_modules() if isinstance(m, FadingLinear)}
    assert len(faded) == 6
    assert all(name.startswith("bert.encoder.") for name in faded)
    trained = {name for name, p in applied.model.named_parameters() if p.requires_grad}
    own = {f"{name}.{kind}" for name in ("classifier", "bert.pooler.dense") for kind in ("weight", "bias")}
    assert trained == own | {f"{name}.weight" for name in faded}


def test_its_options_are_those_of_the_config(toy):
    (options,) = described_system("fading")[1].values()
    assert list(options) == [field.name for field in dataclasses.fields(FadingConfig)]
    assert options["share"].help == "of each weight's entries that are 0 at the end, in [0, 1)."
    with pytest.raises(UnknownNameError, match="method fading has no option 'sahre'; nearest: share"):
        with_options(toy, {"sahre": 0.5})
    with pytest.raises(ValueError, match="share must be a finite number"):
        with_options(toy, {"share": 1.0})


@pytest.mark.parametrize(
    ("kind", "target", "message"),
    [
        (
            "compress",
            "lowdim.adapters:LoRA",
            "a function of lowdim.compress whose argument config .*; got 'lowdim.adapters:LoRA'",
        ),
        ("compress", "", "a function of lowdim.compress .*, as its kind is 'compress'; got ''"),
        ("compress", "lowdim.compress:finalize", "a function of lowdim.compress whose argument config"),
        ("adapter", "lowdim.compress:lord", "a lowdim.adapters Method, as its kind is 'adapter'; got 'lowdim.compress:lord'"),
        ("optimizer", "lowdim.layers:Monarch", "a lowdim.optim ProjectedOptimizer, as its kind is 'optimizer'"),
        ("layer", "lowdim.adapters:LoRA", "an nn.Module with from_linear, as its kind is 'layer'"),
        ("full", "lowdim.adapters:LoRA", "empty, as its kind is 'full'; got 'lowdim.adapters:LoRA'"),
        ("probe", "lowdim.adapters:LoRA", "empty, as its kind is 'probe'"),
    ],
)
def test_a_kind_that_does_not_fit_the_target_is_refused(kind, target, message):
    with pytest.raises(TypeError, match=f"target of method odd must be {message}"):
        strategy_for(Variant("odd", target=target, kind=kind))


def test_a_compression_without_a_schedule_is_refused():
    once = Variant("once", target="lowdim.compress:welore", kind="compress", options={"target": 0.8})
    with pytest.raises(LowdimError, match="no layer that follows a schedule"):
        apply(once, tiny.llama(), lr=1e-3, steps=2)

import copy
import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import tiny
from lowdim import methods, models
from lowdim.catalogue import variant
from lowdim.companion import Companion
from lowdim.errors import UnknownNameError
from lowdim.methods import Applied
from lowdim.train.callbacks import AdaptedCallback
from lowdim.train.loop import FitSettings, check_tracker, fit
from lowdim.train.tasks import LanguageModelling, classification, stack_blocks


def blocks(count=24, length=8, seed=0):
    import datasets

    ids = torch.randint(0, 48, (count, length), generator=torch.Generator().manual_seed(seed)).tolist()
    rows = datasets.Dataset.from_dict({"input_ids": ids, "labels": ids})
    return LanguageModelling(train=rows, validation=rows, test=rows, collate=stack_blocks, max_length=length)


def ready(name="lora", lr=1e-2, steps=6, model=None, head=(), task=None, **options):
    """A tiny model made ready by a method of the catalogue."""
    torch.manual_seed(3)
    model = tiny.llama() if model is None else model
    task = task or blocks()
    chosen = methods.with_options(variant(name), options)
    batches = task.sample_batches(2, 4, torch.device("cpu"))
    return methods.apply(chosen, model, lr=lr, steps=steps, head=head, batches=batches, loss_fn=task.loss_fn)


def run(applied, tmp_path, task=None, callbacks=(), measure=False, **settings):
    settings = {"steps": 6, "batch_size": 4, "lr": 1e-2, **settings}
    return fit(applied, task or blocks(), FitSettings(**settings), tmp_path, callbacks=callbacks, measure_memory=measure)


def weights(applied):
    return {name: p.detach().clone() for name, p in applied.model.named_parameters()}


@pytest.mark.parametrize("accumulation", [1, 3])
def test_step_is_called_once_after_each_optimizer_step(tmp_path, accumulation):
    applied = ready(rank=2)
    seen, update = [], next(iter(applied.adapted.layers.values())).update
    before = update.B.detach().clone()
    original = applied.adapted.step

    def step(optimizer=None):
        seen.append((optimizer is not None, not torch.equal(update.B, before)))
        before.copy_(update.B.detach())
        original(optimizer)

    applied.adapted.step = step
    result = run(applied, tmp_path, gradient_accumulation=accumulation, warmup=0.0, schedule="constant")
    assert result.steps == list(range(1, 7))
    assert seen == [(True, True)] * 6, "once a step, with the optimizer, after it has moved the weights"


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_companion_is_called_in_every_step_and_finished_once(tmp_path, accumulation):
    calls = []

    class Noted(Companion):
        def loss(self, forward, logits):
            calls.append("loss")
            return 0.0

        def step(self, optimizer=None):
            calls.append("step" if optimizer is not None else "no optimizer")

        def finish(self):
            calls.append("finish")

    def make(optimizer):
        return Noted()

    applied = ready("full")
    applied.make_companion = make
    run(applied, tmp_path, steps=4, gradient_accumulation=accumulation)
    assert calls == [*(["loss"] * accumulation + ["step"]) * 4, "finish"]


def test_the_callback_is_one_of_transformers():
    from transformers import TrainerCallback

    assert issubclass(AdaptedCallback, TrainerCallback)
    calls = []
    AdaptedCallback(SimpleNamespace(step=calls.append)).on_optimizer_step(None, None, None, optimizer="the optimizer")
    assert calls == ["the optimizer"]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_lamdas_schedule_advances_with_the_training(tmp_path, accumulation):
    applied = ready("lamda", steps=8, rank=4, freeze_fraction=0.5)
    updates = [layer.update for layer in applied.adapted.layers.values()]
    frozen, held = [], []

    class Watch(_callback()):
        def on_step_begin(self, args, state, control, **kwargs):
            frozen.append(updates[0].frozen_columns())
            held.append(updates[0].B.detach().clone())

    run(applied, tmp_path, steps=8, gradient_accumulation=accumulation, callbacks=(Watch(),))
    assert frozen == [0, 1, 2, 3, 4, 4, 4, 4], "the first of eight steps is the warm-up's"
    assert all(int(u.steps) == 8 for u in updates)
    assert torch.equal(held[0][:, 0], held[-1][:, 0]), "the first column was never moved"
    assert not torch.equal(held[0][:, 2], held[3][:, 2])
    assert torch.equal(held[4], held[-1]), "and in the end none is"


def _callback():
    from transformers import TrainerCallback

    return TrainerCallback


def bert_parts(folder, file):
    task = classification(models.load_tokenizer(str(folder)), [file], max_length=16)
    model = models.load_model(str(folder), "classify")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # its draws depend on the shape of the batch
    return model, task


@pytest.mark.parametrize("kind", ["causal-lm", "classify", "pooled"])
def test_accumulated_batches_are_one_large_batch(tmp_path, kind, bert_folder, pooled_folder, two_classes):
    # Several classifiers of transformers accept any keyword, and the trainer then takes their mean loss for a sum.
    if kind == "causal-lm":
        model, task, head = tiny.llama(), blocks(), ()
    else:
        model, task = bert_parts(pooled_folder if kind == "pooled" else bert_folder, two_classes)
        head = ("classifier",)
    found = []
    for size, accumulation in ((8, 1), (2, 4)):
        own = copy.deepcopy(model)
        applied = ready("full", model=own, head=head, task=task)
        applied.make_optimizer = lambda rate, own=own: torch.optim.SGD(own.parameters(), lr=rate)
        result = run(
            applied, tmp_path, task=task, steps=3, batch_size=size, gradient_accumulation=accumulation, lr=0.1,
            warmup=0.0, schedule="constant", max_grad_norm=0.0,
        )  # fmt: skip
        found.append((result.losses, weights(applied)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    for name, weight in found[0][1].items():
        assert torch.allclose(weight, found[1][1][name], atol=2e-6), name


class Bare(nn.Module):
    """A loss of a single number: `scale · w`, where `scale` comes with the batch."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(()))
        self.extra = nn.Parameter(torch.zeros(()))
        self.calls = 0
        self.script = {}

    def forward(self, input_ids, labels=None, **kwargs):
        self.calls += self.training
        return {"loss": self.w * self.script.get(self.calls, 1.0) + 0 * self.extra}


def bare(model=None, adapted=None):
    model = model or Bare()
    return Applied(model, variant("full"), lambda lr: torch.optim.SGD(model.parameters(), lr=lr), adapted)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_regularizer_is_added_once_a_step(tmp_path, accumulation):
    model = Bare()
    adapted = SimpleNamespace(
        loss=lambda forward, logits: 3.0 * model.extra,
        step=lambda optimizer: None,
        finish=lambda: None,
        follow=lambda scheduler, warmup, total: None,
        check_gradients=lambda: None,
    )
    result = run(
        bare(model, adapted), tmp_path, steps=4, gradient_accumulation=accumulation, lr=0.5, warmup=0.0,
        schedule="constant", max_grad_norm=0.0,
    )  # fmt: skip
    assert model.extra.item() == pytest.approx(-0.5 * 3.0 * 4)
    assert model.w.item() == pytest.approx(-0.5 * 4)
    # w falls by 0.5 a step, and 3·extra by 4.5: the loss that is logged is the task's, the penalty is logged beside it.
    assert result.losses == pytest.approx([0.0, -0.5, -1.0, -1.5])
    assert result.penalties == pytest.approx([0.0, -4.5, -9.0, -13.5])


def test_rates_follow_the_schedule_and_the_methods_own_groups(tmp_path):
    model, rates = Bare(), []
    applied = bare(model)
    groups = [{"params": [model.w], "lr": 1.0}, {"params": [model.extra], "lr": 4.0}]
    applied.make_optimizer = lambda lr: torch.optim.SGD(groups, lr=lr)

    class Watch(_callback()):
        def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            rates.append([g["lr"] for g in optimizer.param_groups])

    run(applied, tmp_path, steps=4, warmup=0.5, lr=1.0, callbacks=(Watch(),))
    assert rates == [[0.0, 0.0], [0.5, 2.0], [1.0, 4.0], [0.5, 2.0]]


@pytest.mark.parametrize(("value", "word"), [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf")])
def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, value, word):
    model = Bare()
    model.w.data.fill_(1.0)
    model.script[3] = value
    result = run(bare(model), tmp_path, lr=0.1, warmup=0.0, schedule="constant")
    assert result.failure == f"the loss became {word} at step 3"
    assert result.steps == [1, 2]
    assert all(map(math.isfinite, result.losses))
    assert model.calls == 3, "no further step was made"
    assert math.isfinite(model.w.item()), "and the optimizer never saw it"


@pytest.mark.parametrize("name", ["full", "lora", "lamda", "galore", "galore-8bit"])
def test_every_kind_of_method_survives_a_rate_that_is_far_too_large(tmp_path, name):
    applied = ready(name, lr=1e30, rank=4) if name != "full" else ready(name, lr=1e30)
    result = run(applied, tmp_path, lr=1e30, steps=6, warmup=0.0, schedule="constant", max_grad_norm=0.0)
    assert result.failure is not None
    assert len(result.losses) < 6
    assert all(map(math.isfinite, result.losses))
    healthy = run(ready(), tmp_path)
    assert healthy.failure is None, "and nothing of it is left for the next run"


def test_memory_is_measured_on_one_step_and_an_exception_there_leaves_nothing_open(tmp_path):
    plain, measured = run(ready(), tmp_path), run(ready(), tmp_path, measure=True)
    assert plain.peak_bytes is None
    held = sum(p.numel() * 4 for p in ready().model.parameters())
    assert held < measured.peak_bytes < 20 * held
    assert measured.losses == plain.losses
    assert measured.seconds_per_step > 0

    class Stop(_callback()):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            if state.global_step == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(ready(), tmp_path, measure=True, callbacks=(Stop(),))
    assert not torch._C._autograd._profiler_enabled()
    again = run(ready(), tmp_path, measure=True)
    assert again.peak_bytes == pytest.approx(measured.peak_bytes, rel=0.2)


def test_the_same_seed_gives_the_same_bits(tmp_path):
    first, second, other = (ready(dropout=0.1) for _ in range(3))
    results = [run(a, tmp_path, seed=s) for a, s in ((first, 5), (second, 5), (other, 6))]
    assert results[0].losses == results[1].losses != results[2].losses
    assert all(torch.equal(w, weights(second)[n]) for n, w in weights(first).items())


def test_only_what_is_trained_moves(tmp_path):
    applied = ready("lora", rank=2)
    before = weights(applied)
    run(applied, tmp_path)
    moved = {name for name, w in weights(applied).items() if not torch.equal(w, before[name])}
    assert moved
    assert all(".update." in name for name in moved)
    assert all(p.grad is None for p in applied.model.parameters()), "no gradients are held when it is over"


def test_gradient_checkpointing_changes_nothing(tmp_path):
    plain, lean = (run(ready(), tmp_path, gradient_checkpointing=on) for on in (False, True))
    assert lean.losses == pytest.approx(plain.losses, rel=1e-5)


def test_bf16_trains(tmp_path):
    result = run(ready(), tmp_path, bf16=True)
    assert result.failure is None
    assert result.losses == pytest.approx(run(ready(), tmp_path).losses, rel=0.02)


def test_an_unfinished_checkpoint_is_not_used(tmp_path):
    from lowdim.train.checkpoints import complete, newest_checkpoint

    assert newest_checkpoint(tmp_path / "none") is None
    for step, state in ((2, {"global_step": 2}), (8, {"global_step": 8}), (10, {"global_step": 10})):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(state))
        if step != 8:  # an earlier version wrote no manifest
            complete(tmp_path / f"checkpoint-{step}", {})
    (tmp_path / "checkpoint-12").mkdir()  # killed before the state was written
    (tmp_path / "checkpoint-14").mkdir()
    (tmp_path / "checkpoint-14" / "trainer_state.json").write_text('{"global_st')  # and in the middle of it
    (tmp_path / "checkpoint-best").mkdir()
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    shutil.rmtree(tmp_path / "checkpoint-10")
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-8")


def test_trackers():
    check_tracker("none")
    with pytest.raises(UnknownNameError, match=r"report_to must be one of none, all, .*'tensorbord' \(nearest: tensorboard"):
        check_tracker("tensorbord")
    from transformers.integrations.integration_utils import get_available_reporting_integrations

    if "comet_ml" not in get_available_reporting_integrations():
        with pytest.raises(ImportError, match="'comet_ml' is not installed"):
            check_tracker("comet_ml")


def test_after_autocast_the_model_computes_in_its_own_dtype(tmp_path):
    """accelerate wraps the forward pass for bf16; what is scored and written afterwards is the plain model."""
    applied = ready(rank=2)
    assert run(applied, tmp_path, steps=2, bf16=True).failure is None
    model, ids = applied.model.eval(), torch.arange(8)[None]
    assert "forward" not in vars(model)
    with torch.no_grad():
        found = model(input_ids=ids).logits
        assert torch.equal(found, type(model).forward(model, input_ids=ids).logits)
        with torch.autocast("cpu", torch.bfloat16):
            assert not torch.equal(found, model(input_ids=ids).logits.float())

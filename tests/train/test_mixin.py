"""Any Trainer with the mixin trains as a loop by hand does: regularizers, proximal steps, schedules, groups, companions."""

import pytest
import torch

import lowdim
import tiny
from killing import Kill
from lowdim.adapters import ATLAS, IncreLoRA, LoRA, SaRA, SoRA
from lowdim.companion import Companion
from lowdim.errors import CheckpointError
from lowdim.optim import AdamW
from lowdim.train import AdaptedCallback, AdaptedTrainerMixin
from snippets import ROOT, blocks

transformers = pytest.importorskip("transformers")


def vectors(model):
    generator = torch.Generator().manual_seed(5)
    return [{name: 0.05 * torch.randn(p.shape, generator=generator) for name, p in model.named_parameters()} for _ in range(2)]


#: Each has a penalty that is large enough to change the weights, except LoRA, which has none.
METHODS = {
    "lora": lambda model: LoRA(rank=4),
    "sora": lambda model: SoRA(rank=4, sparse_lambda=50.0, threshold=1e-4),
    "increlora": lambda model: IncreLoRA(
        target_rank=2, rank_step=1, init_warmup=0, update_interval=1, top_h=3, orth_weight=5.0
    ),
    "sara": lambda model: SaRA(0.02, lambda_rank=3.0, nuclear_min_dim=4, nuclear_min_count=0),
    "atlas": lambda model: ATLAS(vectors(model)),
}
STEPS, RATE = 4, 1e-2


def readme():
    """The README's block for a Trainer, with more steps and a free method."""
    (block,) = [b for b in blocks(ROOT / "README.md", "python") if "AdaptedTrainerMixin" in b.body]
    changes = {"max_steps=2": f"max_steps={STEPS}, logging_steps=1", "learning_rate=1e-3": f"learning_rate={RATE}"}
    changes["lowdim.adapters.LoRA(rank=4)"] = "METHOD(model)"
    body = block.body
    for old, new in changes.items():
        assert body.count(old) == 1, f"the README's block no longer has {old!r} once"
        body = body.replace(old, new)
    return body


def by_hand(method):
    """The README's first loop, with the Trainer's schedule and clipping."""
    from lowdim import models

    model = models.load_model("stories260k", "causal-lm")
    ids = models.load_tokenizer("stories260k")(["Once upon a time there was a tiny model."] * 8)["input_ids"]
    rows = torch.tensor(ids)
    adapted = lowdim.adapt(model, method(model))
    optimizer = torch.optim.AdamW(adapted.param_groups(lr=RATE), lr=RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    losses, penalties = [], []
    model.train()
    for _ in range(STEPS):
        task, penalty = model(input_ids=rows, labels=rows).loss, adapted.regularizer()
        losses.append(float(task.detach()))
        penalties.append(float(penalty))
        (task + penalty).backward()
        torch.nn.utils.clip_grad_norm_(adapted.trainable().values(), 1.0)
        optimizer.step()
        adapted.step(optimizer)
        adapted.follow(schedule, warmup=0, total=STEPS)
        schedule.step()
        optimizer.zero_grad()
    return adapted, losses, penalties


@pytest.mark.parametrize("name", METHODS)
def test_the_readme_trains_every_method_in_full(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope = {"METHOD": METHODS[name], "__name__": "readme"}
    exec(compile(readme(), "README.md", "exec"), scope)
    adapted, losses, penalties = by_hand(METHODS[name])
    logged = [entry for entry in scope["trainer"].state.log_history if "loss" in entry]
    assert [entry["loss"] for entry in logged] == pytest.approx(losses, abs=1e-4)  # rounded in the log
    if name == "lora":
        assert all("penalty" not in entry for entry in logged)
    else:
        assert [entry["penalty"] for entry in logged] == pytest.approx(penalties, rel=1e-5)
        assert penalties[-1] > 0
    want, got = adapted.state_dict(), scope["adapted"].state_dict()
    assert want.keys() == got.keys()
    size = sum(float(value.float().square().sum()) for value in want.values())
    off = sum(float((got[key].float() - value.float()).square().sum()) for key, value in want.items())
    assert off < 1e-10 * size  # fused or not, Adam rounds differently


class Mixed(AdaptedTrainerMixin, transformers.Trainer):
    """As users write it."""


def trainer(model, adapted, folder, *, kind=Mixed, rows=12, **options):
    arguments = {
        "max_steps": 3, "learning_rate": 1e-2, "per_device_train_batch_size": 4, "report_to": "none", "logging_steps": 1,
        "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "lr_scheduler_type": "constant", "max_grad_norm": 0.0,
    }  # fmt: skip
    own = {key: options.pop(key) for key in ("companions", "callbacks") if key in options}
    ids = torch.randint(0, 48, (rows, 8), generator=torch.Generator().manual_seed(1)).tolist()
    settings = transformers.TrainingArguments(str(folder), **{**arguments, **options})
    return kind(model, settings, train_dataset=[{"input_ids": r, "labels": r} for r in ids], adapted=adapted, **own)


def model(dtype=torch.float32):
    torch.manual_seed(3)
    return tiny.llama().to(dtype)


@pytest.mark.parametrize("counts", [True, False], ids=["items of all micro-batches", "means of micro-batches"])
def test_the_penalty_is_added_once_whatever_the_accumulation(counts, tmp_path):
    """Both ways in which a Trainer makes the loss of an accumulated batch."""

    class Plain(Mixed):
        def __init__(self, *args, **others):
            super().__init__(*args, **others)
            self.model_accepts_loss_kwargs = counts

    ends, logs = [], []
    for size, parts in ((4, 1), (2, 2), (1, 4)):
        own = model()
        adapted = lowdim.adapt(own, SoRA(rank=4, sparse_lambda=10.0, threshold=1e-4))
        made = trainer(
            own, adapted, tmp_path, kind=Plain, per_device_train_batch_size=size, gradient_accumulation_steps=parts,
            optim="sgd", learning_rate=0.1,
        )  # fmt: skip
        made.train()
        ends.append(adapted.state_dict())
        logs.append([(e["loss"], e["penalty"]) for e in made.state.log_history if "loss" in e])
    for other, log in zip(ends[1:], logs[1:], strict=True):
        assert all(torch.allclose(other[key], value, atol=1e-6) for key, value in ends[0].items())
        assert [x for row in log for x in row] == pytest.approx([x for row in logs[0] for x in row], abs=1e-4)


def test_a_penalty_that_nobody_adds_stops_the_training(tmp_path):
    """The former recipe, with a callback that only steps."""
    own = model()
    adapted = lowdim.adapt(own, SoRA(rank=4))

    class Bare(transformers.Trainer):
        def __init__(self, *args, adapted, **others):
            super().__init__(*args, **others, callbacks=[AdaptedCallback(adapted, regularize=False)])

    with pytest.raises(RuntimeError, match=r"SoRA has a regularizer, which was not added .*AdaptedTrainerMixin"):
        trainer(own, adapted, tmp_path, kind=Bare).train()


@pytest.mark.parametrize("name", ["sora", "increlora", "sara"])
def test_a_loop_without_the_regularizer_is_refused(name):
    own = model()
    adapted = lowdim.adapt(own, METHODS[name](own))
    optimizer = torch.optim.SGD(adapted.param_groups(1e-2))
    rows = torch.arange(8).reshape(1, 8)
    for added in (True, False):
        loss = own(input_ids=rows, labels=rows).loss
        (loss + adapted.regularizer() if added else loss).backward()
        optimizer.step()
        if added:
            adapted.step(optimizer)
        else:
            with pytest.raises(RuntimeError, match="has a regularizer, which was not added to the loss since the last step"):
                adapted.step(optimizer)
        optimizer.zero_grad()


@pytest.mark.parametrize(
    "method",
    [LoRA(rank=2), SoRA(rank=2, sparse_lambda=0.0), IncreLoRA(orth_weight=0.0), SaRA(0.02)],
    ids=lambda m: type(m).__name__,
)
def test_methods_without_a_regularizer_step_freely(method):
    own = model()
    adapted = lowdim.adapt(own, method)
    optimizer = torch.optim.SGD(adapted.param_groups(1e-2))
    rows = torch.arange(8).reshape(1, 8)
    for _ in range(2):
        own(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        adapted.step(optimizer)


def test_groups_rates_and_decay_are_the_methods(tmp_path):
    own = model()
    adapted = lowdim.adapt(own, SoRA(rank=2))
    made = trainer(own, adapted, tmp_path, weight_decay=0.1)
    made.create_optimizer()
    assert [group["weight_decay"] for group in made.optimizer.param_groups] == [0.1, 0.0], "gates are not decayed"
    assert made.create_optimizer() is made.optimizer


def test_16_bit_adapters_keep_small_updates(tmp_path):
    own = model(torch.bfloat16)
    adapted = lowdim.adapt(own, LoRA(rank=2))
    made = trainer(own, adapted, tmp_path)
    made.train()
    assert isinstance(made.optimizer.optimizer, AdamW)


class Pull(Companion):
    """A pull on the adapter that grows with the steps."""

    def __init__(self, adapted):
        self.adapted, self.count, self.finished = adapted, 0, 0

    def loss(self, forward, logits):
        assert logits.shape[-1] == 48
        return self.count * sum(p.square().sum() for p in self.adapted.trainable().values())

    def step(self, optimizer=None):
        assert optimizer is not None
        self.count += 1

    def finish(self):
        self.finished += 1

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


def test_companions_act_and_are_kept_in_checkpoints(tmp_path):
    """Killed and resumed gives the same bits."""

    def made(folder, **options):
        own = model()
        adapted = lowdim.adapt(own, LoRA(rank=2), seed=1)
        pull = Pull(adapted)
        how = {"companions": [pull], "max_steps": 6, "save_strategy": "steps", "save_steps": 2, **options}
        return trainer(own, adapted, folder, **how), adapted, pull

    whole, want, pull = made(tmp_path / "whole")
    whole.train()
    assert (pull.count, pull.finished) == (6, 1)
    penalties = [entry["penalty"] for entry in whole.state.log_history if "loss" in entry]
    assert penalties[0] == 0.0
    assert penalties[3] > 0.0
    killed, _, _ = made(tmp_path / "killed", callbacks=[Kill(3)])
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    again, got, pull = made(tmp_path / "killed")
    again.train(resume_from_checkpoint=str(tmp_path / "killed" / "checkpoint-2"))
    assert pull.count == 6
    assert all(torch.equal(got.state_dict()[key], value) for key, value in want.state_dict().items())
    (tmp_path / "killed" / "checkpoint-4" / "companions.pt").unlink()
    with pytest.raises(CheckpointError, match=r"companions.pt is missing"):
        made(tmp_path / "killed")[0].train(resume_from_checkpoint=str(tmp_path / "killed" / "checkpoint-4"))


def test_what_does_not_go_together_is_refused(tmp_path):
    own = model()
    adapted = lowdim.adapt(own, LoRA(rank=2))
    with pytest.raises(ValueError, match=r"AdaptedCallback would make the steps .* a second time"):
        trainer(own, adapted, tmp_path, callbacks=[AdaptedCallback(adapted)])
    with pytest.raises(TypeError, match="adapted"):
        Mixed(own, transformers.TrainingArguments(str(tmp_path), use_cpu=True))

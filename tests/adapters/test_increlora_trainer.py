"""IncreLoRA under transformers.Trainer: parameters come during the training, and a killed run goes on to the same bits."""

import pytest
import torch
from torch import nn

import lowdim
from lowdim.adapters import IncreLoRA, increlora_lr_lambda
from lowdim.files import read_tensors
from lowdim.train.callbacks import AdaptedCallback

transformers = pytest.importorskip("transformers")

STEPS, WARMUP, RATE = 12, 2, 0.05


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(8, 12), nn.Linear(12, 3)

    def forward(self, x, labels):
        logits = self.second(torch.tanh(self.first(x)))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Watch(transformers.TrainerCallback):
    """Notes the rates, and ends the run as a user would."""

    def __init__(self, kill):
        self.kill, self.rates = kill, {}

    def on_step_begin(self, args, state, control, **kwargs):
        self.rates[state.global_step] = [group["lr"] for group in kwargs["optimizer"].param_groups]

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.kill:
            raise KeyboardInterrupt


class Trainer(transformers.Trainer):
    def __init__(self, adapted, **kwargs):
        self.adapted = adapted
        super().__init__(**kwargs)

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW(self.adapted.param_groups(RATE), lr=RATE, weight_decay=0.0)
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        outputs = model(**inputs)
        loss = outputs["loss"] + self.adapted.regularizer()
        return (loss, outputs) if return_outputs else loss


def rows():
    x = torch.randn(40, 8, generator=torch.Generator().manual_seed(1))
    return [{"x": row, "labels": int(row[:3].argmax())} for row in x]


def train(folder, save_steps=0, kill=0, resume=False):
    # Grows at calls 0 (the reserves), 3 and 6 of the allocator.
    method = IncreLoRA(
        rank=1, target_rank=2, alpha=8, dropout=0.1, rank_step=1, top_h=1, init_warmup=0, update_interval=3, weight_decay=0.01
    )
    adapted = lowdim.adapt(Net(), method)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=RATE,
        warmup_steps=WARMUP,
        save_strategy="steps" if save_steps else "no",
        save_steps=save_steps or 500,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        remove_unused_columns=False,
        seed=5,
    )
    watch = Watch(kill)
    callbacks = [AdaptedCallback(adapted), watch]
    trainer = Trainer(adapted, model=adapted.model, args=arguments, train_dataset=rows(), callbacks=callbacks)
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    if kill:
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    else:
        trainer.train(resume_from_checkpoint=resume or None)
    return adapted, trainer, watch


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return train(tmp_path_factory.mktemp("whole"))


def test_growth_under_a_trainer(whole):
    adapted, trainer, watch = whole
    assert adapted.total_rank == 4
    assert [group.get("added_at") for group in trainer.optimizer.param_groups] == [None, 0, 3, 6]
    start = Net()
    assert torch.equal(adapted.layers["first"].base.weight, start.first.weight)
    assert all(float(e.detach()) not in (0.0, pytest.approx(1e-5)) for u in _updates(adapted) for e in u.E[1 : int(u.ranknum)])
    for step, rates in watch.rates.items():
        starts = [0, *(call for call in (0, 3, 6) if call < step)]
        want = [RATE * increlora_lr_lambda(WARMUP, STEPS, call)(step) for call in starts]
        assert rates == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize(
    ("save_steps", "kill"),
    [
        (2, 3),  # from a checkpoint with reserves only: both growths come after the resume
        (5, 6),  # between the growths
        (8, 10),  # after the target was reached
    ],
)
def test_killed_and_resumed_gives_the_same_bits(whole, tmp_path, save_steps, kill):
    adapted, trainer, _ = whole
    train(tmp_path, save_steps, kill)
    grown = {2: 2, 5: 3, 8: 4}[save_steps]
    saved, _ = read_tensors(tmp_path / f"checkpoint-{save_steps}" / "model.safetensors")
    assert sum(float(value) for key, value in saved.items() if key.endswith("ranknum")) == grown
    resumed, again, _ = train(tmp_path, save_steps, resume=True)
    want, got = adapted.model.state_dict(), resumed.model.state_dict()
    assert want.keys() == got.keys()
    assert all(torch.equal(got[key], value) for key, value in want.items())
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (trainer, again)]
    assert losses[0] == losses[1]
    assert resumed.importance() == adapted.importance()
    first, second = trainer.optimizer.state_dict(), again.optimizer.state_dict()
    assert first["param_groups"] == second["param_groups"]
    for place, state in first["state"].items():
        assert all(torch.equal(second["state"][place][key], value) for key, value in state.items())


def _updates(adapted):
    return [layer.update for layer in adapted.layers.values()]

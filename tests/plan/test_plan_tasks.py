"""Forecasts for every task, and for modules of one's own, against what training really takes."""

import pytest
import torch
from subjects import Convolutions, bert, llama
from torch import nn
from torch.nn.functional import cross_entropy

from lowdim.catalogue import variant
from lowdim.methods import apply
from lowdim.models import build, head_modules
from lowdim.models.forms import FORMS
from lowdim.plan import faked, forecast, measure

pytest.importorskip("transformers")

ROWS, LENGTH, OUTPUTS = 8, 64, 5
#: A kernel's own buffers and scalars, which no tensor shows.
HIDDEN = 0.005


def vit():
    """Images of another size and with other channels than most models have."""
    from transformers import ViTConfig

    sizes = {"hidden_size": 96, "intermediate_size": 192, "num_attention_heads": 4, "num_hidden_layers": 2}
    return ViTConfig(image_size=32, patch_size=8, num_channels=1, **sizes)


def texts(config, labels):
    ids = torch.randint(3, config.vocab_size, (ROWS, LENGTH))
    mask = torch.ones_like(ids)
    mask[0, LENGTH // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def pairs(config):
    """Two texts in each row, the second ones after the first."""
    columns = [texts(config, torch.zeros(ROWS)) for _ in range(2)]
    return {**columns[0], **{name: torch.cat([column[name] for column in columns]) for name in ("input_ids", "attention_mask")}}


def spoken(config):
    labels = torch.randint(3, config.vocab_size, (ROWS, LENGTH))
    labels[:, : LENGTH // 2] = -100
    return texts(config, labels)


def blocks(config):
    ids = torch.randint(3, config.vocab_size, (ROWS, LENGTH))
    return {"input_ids": ids, "labels": ids.clone()}


def images(config):
    return {"pixel_values": torch.randn(ROWS, 1, 32, 32), "labels": torch.arange(ROWS) % OUTPUTS}


#: Task, model, the kind of problem, and a real batch.
CASES = {
    "classify": ("classify", bert, None, lambda config: texts(config, torch.arange(ROWS) % OUTPUTS)),
    "several-labels": ("classify", bert, "multi_label_classification", lambda config: texts(config, torch.ones(ROWS, OUTPUTS))),
    "regress": ("regress", bert, None, lambda config: texts(config, torch.randn(ROWS))),
    "instruct": ("instruct", llama, None, spoken),
    "causal-lm": ("causal-lm", llama, None, blocks),
    "pretrain": ("pretrain", llama, None, blocks),
    "image": ("image", vit, None, images),
    "embed": ("embed", bert, None, pairs),
    "tokens": ("tokens", bert, None, lambda config: texts(config, torch.arange(ROWS * LENGTH).reshape(ROWS, -1) % OUTPUTS)),
}


def train(model, method, batch, loss_fn, head):
    """The peak of two real steps."""
    applied = apply(variant(method), model.train(), batches=iter([batch] * 4), loss_fn=loss_fn, lr=1e-3, steps=100, head=head)
    optimizer = applied.start(1e-3)
    applied.model.zero_grad(set_to_none=True)

    def run():
        for _ in range(2):
            applied.loss(batch, loss_fn).total.backward()
            optimizer.step()
            applied.after_step(optimizer)
            optimizer.zero_grad()

    tensors = batch.values() if isinstance(batch, dict) else batch
    return measure(run, model=applied.model, optimizer=optimizer, tensors=tensors).bytes, applied.trained()


def test_every_task_is_here():
    assert {task for task, *_ in CASES.values()} == set(FORMS)


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("case", CASES)
def test_the_forecast_is_what_training_takes(case, method):
    task, make, problem, make_batch = CASES[case]
    config = make()
    outputs = 1 if task == "regress" else OUTPUTS
    torch.manual_seed(0)
    model = build(config, task, num_labels=outputs, problem=problem)
    took, trained = train(model, method, make_batch(config), lambda m, b: m(**b).loss, head_modules(model, task))
    got = forecast(config, method, task=task, num_labels=outputs, problem=problem, batch_size=ROWS, sequence_length=LENGTH)
    assert got.trained_parameters == trained
    assert got.total == pytest.approx(took, rel=HIDDEN)


@pytest.mark.parametrize("method", ["full", "lora", "linear-probe"])
def test_a_module_with_a_head_and_batches_that_are_tuples(method):
    def loss(model, batch):
        return cross_entropy(model(batch[0]), batch[1])

    batch = (torch.randn(ROWS, 3, 16, 16), torch.arange(ROWS) % 4)
    got = forecast(
        Convolutions, method, head=("classifier",), loss_fn=loss, batch=lambda: tuple(map(faked, batch)), batch_size=ROWS
    )
    took, trained = train(Convolutions(), method, batch, loss, ("classifier",))
    assert got.trained_parameters == trained
    assert got.total == pytest.approx(took, rel=0.05)  # the convolutions' own buffers are not seen


def test_the_numbers_of_a_batch_are_left_out_under_the_forecast_only():
    real = torch.ones(2)
    assert faked(real) is real
    seen = []
    forecast(
        lambda: nn.Linear(2, 1), "full", batch=lambda: seen.append(faked(real)) or seen[0], loss_fn=lambda m, x: m(x).sum()
    )
    assert type(seen[0]) is not torch.Tensor
    assert seen[0].shape == real.shape


@pytest.mark.parametrize("columns", [2, 3])
def test_an_encoder_of_pairs_runs_on_each_column(columns):
    """As sentence-transformers trains: the gradient of a column is complete before that of the next is added."""
    model = build(bert(), "embed").eval()
    rows, calls = 4, []
    ids = torch.randint(3, 60, (columns * rows, 8), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    model.encoder.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    found = model(**batch, labels=torch.zeros(rows))
    assert calls == [rows] * columns
    whole = model(**batch).logits
    scores = 20 * whole[:rows] @ whole[rows:].T
    torch.testing.assert_close(found.loss, cross_entropy(scores, torch.arange(rows)))
    sizes = model.nested_loss({**batch, "labels": torch.zeros(rows)}, [(1, 16), (2, 32)])
    assert sizes > found.loss

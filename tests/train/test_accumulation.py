"""Accumulated batches are one large batch: every row, or token that counts, weighs the same, for every method."""

import copy

import pytest
import torch
from torch import nn

import tiny
from lowdim import methods, models
from lowdim.catalogue import variant
from lowdim.testing.processes import in_processes
from lowdim.train.loop import FitSettings, fit
from lowdim.train.tasks import LanguageModelling, classification, stack_blocks

#: One row of each way to train, and every method with a penalty.
NAMES = ["full", "lora", "sora", "increlora", "sara", "galore", "fira", "dct", "sltrain", "sst", "maestro"]


def masked(rows):
    """Blocks whose labels count where a token is above 12, so that rows differ, and the first row has none."""
    batch = stack_blocks(rows)
    batch["labels"] = torch.where(batch["input_ids"] > 12, batch["labels"], -100)
    return batch


def blocks(count=5, collate=masked):
    import datasets

    ids = torch.randint(0, 48, (count, 8), generator=torch.Generator().manual_seed(0))
    ids[0] = torch.arange(8)
    rows = datasets.Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})
    return LanguageModelling(train=rows, validation=rows, test=rows, collate=collate, max_length=8)


def gradients(model, applied, task, folder, *, size, parts, steps=1):
    """Losses, and each trained parameter's gradient before every step."""
    from transformers import TrainerCallback

    found = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            for name, p in model.named_parameters():
                if p.grad is not None:
                    found.append((name, p.grad.detach().clone()))

    settings = FitSettings(
        steps=steps, batch_size=size, gradient_accumulation=parts, lr=1e-3, warmup=0.0, schedule="constant", max_grad_norm=0.0
    )
    result = fit(applied, task, settings, folder, callbacks=(Watch(),))
    return result, found


def compare(one, other, bound=1e-6):
    (first, want), (second, got) = one, other
    assert first.losses == pytest.approx(second.losses, abs=bound)
    assert first.penalties == pytest.approx(second.penalties, rel=1e-5)
    assert [name for name, _ in want] == [name for name, _ in got]
    assert want
    for (name, a), (_, b) in zip(want, got, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=bound), name


@pytest.mark.parametrize(("size", "parts"), [(2, 4), (4, 2), (1, 5)], ids=["2+2+1", "4+1", "1+1+1+1+1"])
@pytest.mark.parametrize("name", NAMES)
def test_the_short_last_group_of_an_epoch(name, size, parts, tmp_path):
    if name != "full" and (size, parts) != (2, 4):
        pytest.skip("one split for the other methods")
    found = []
    for how in ((8, 1), (size, parts)):
        torch.manual_seed(3)
        model = tiny.llama()
        rank = {"rank": 4} if "rank" in methods.strategy_for(variant(name)).option_names() else {}
        task = blocks()
        applied = methods.apply(methods.with_options(variant(name), rank), model, lr=1e-3, steps=8, batches=None)
        found.append(gradients(applied.model, applied, task, tmp_path, size=how[0], parts=how[1]))
    compare(*found)


def test_rows_of_a_classifier(tmp_path, bert_folder, two_classes):
    """The texts of a micro-batch are padded to the longest of it, which must not change what a row weighs."""
    task = classification(models.load_tokenizer(str(bert_folder)), [two_classes], max_length=16)
    task.train = task.train.select(range(7))
    base = models.load_model(str(bert_folder), "classify")
    for module in base.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    found = []
    for size, parts in ((8, 1), (3, 3), (2, 4)):
        model = copy.deepcopy(base)
        applied = methods.apply(variant("lora"), model, lr=1e-3, steps=2, head=("classifier",))
        found.append(gradients(model, applied, task, tmp_path, size=size, parts=parts))
    compare(found[0], found[1])
    compare(found[0], found[2])


def test_a_step_in_which_no_label_counts_says_so(tmp_path):
    def none(rows):
        batch = stack_blocks(rows)
        return {**batch, "labels": torch.full_like(batch["labels"], -100)}

    applied = methods.apply(variant("full"), tiny.llama(), lr=1e-3, steps=1)
    result, _ = gradients(applied.model, applied, blocks(collate=none), tmp_path, size=2, parts=2)
    assert result.failure == "no label counts in the batch of step 1: all are -100"


def test_layerwise_updates_weigh_the_same(tmp_path):
    ends = []
    for size, parts, layerwise in ((8, 1, False), (2, 3, True)):
        torch.manual_seed(3)
        model = tiny.llama()
        how = {"layerwise": layerwise, "accumulate": parts if layerwise else 1}
        applied = methods.apply(methods.with_options(variant("galore"), {"rank": 4}), model, lr=1e-3, steps=2, **how)
        settings = FitSettings(
            steps=2, batch_size=size, gradient_accumulation=parts, lr=1e-3, warmup=0.0, max_grad_norm=0.0, clips_itself=True
        )
        result = fit(applied, blocks(6), settings, tmp_path)
        ends.append((result.losses, [p.detach().clone() for p in model.parameters()]))
    assert ends[0][0] == pytest.approx(ends[1][0], abs=1e-5)


def _train(rank, world, folder):
    torch.manual_seed(3)
    model = tiny.llama()
    applied = methods.apply(methods.with_options(variant("sora"), {"rank": 4}), model, lr=1e-3, steps=1)
    result, found = gradients(model, applied, blocks(6), folder, size=1, parts=3 if world == 2 else 6)
    return float(result.losses[0]), float(result.penalties[0]), [(name, grad.numpy()) for name, grad in found]


@pytest.mark.slow
def test_two_processes_weigh_their_tokens_together(tmp_path):
    """Six rows with different numbers of tokens, three on each process."""
    loss, penalty, found = in_processes(_train, 2, tmp_path)
    want = _train(0, 1, tmp_path)
    assert loss == pytest.approx(want[0], abs=1e-5)
    assert penalty == pytest.approx(want[1], rel=1e-5)
    for (name, a), (_, b) in zip(want[2], found, strict=True):
        assert torch.allclose(torch.from_numpy(a), torch.from_numpy(b), rtol=1e-4, atol=1e-6), name

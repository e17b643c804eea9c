"""Forecasts for several devices, against shards counted by hand and against two real processes."""

import pytest
import torch
import torch.distributed as dist
from subjects import BATCH, LENGTH, batch_of, bert, llama, loss_of, task_of

from lowdim.catalogue import variant
from lowdim.methods import apply, with_options
from lowdim.models import build, head_modules
from lowdim.plan import forecast, measure
from lowdim.plan.depths import _extend
from lowdim.plan.fake import Subject
from lowdim.plan.rehearse import Plan, rehearse
from lowdim.surgery import shard, units
from lowdim.testing.processes import in_processes

pytest.importorskip("transformers")

METHODS = ("full", "lora", "galore", "lamda", "sora", "monarch")


def predict(config, method, devices, **more):
    return forecast(config, method, task=task_of(config), batch_size=BATCH, sequence_length=LENGTH, devices=devices, **more)


def shards(config, devices):
    """Bytes of the first device's shards: of each parameter the rows, divided and rounded up."""
    model = build(config, task_of(config))
    rows = [(-(-p.shape[0] // devices), p[0].numel()) for p in model.parameters()]
    buffers = sum(b.nbytes for b in model.buffers())
    return sum(count * width * 4 for count, width in rows) + buffers


@pytest.mark.parametrize("devices", [2, 3, 8])
def test_each_device_holds_its_rows(devices):
    got = predict(llama(), "full", devices)
    assert got.devices == devices
    assert got.weights == shards(llama(), devices)
    assert got.trained_parameters == predict(llama(), "full", 1).trained_parameters
    assert got.file_bytes == predict(llama(), "full", 1).file_bytes


def test_moments_are_spread_as_the_weights_are():
    weights = sum(-(-p.shape[0] // 4) * p[0].numel() * 4 for p in build(llama(), "causal-lm").parameters())
    after = rehearse(Subject.of(llama(), task="causal-lm"), Plan(variant("full"), BATCH, LENGTH, devices=4)).peaks
    state = [peak.by_kind["optimizer_state"] for (step, phase, *_), peak in after.items() if (step, phase) == (2, "forward")]
    assert min(state) == pytest.approx(2 * weights, rel=0.001)  # and a count of steps for each


def test_what_is_gathered_is_workspace():
    """A wide model and hardly any activations: the forward pass holds the root's weights, and a block twice as it arrives."""
    config = llama(2, hidden_size=512, intermediate_size=1024)
    config.vocab_size = 64
    got = forecast(config, "lora", task="causal-lm", batch_size=1, sequence_length=2, devices=8)
    block = sum(p.numel() * 4 for p in build(config, "causal-lm").model.layers[0].parameters())
    assert 2 * block < got.workspace < 3.5 * block
    assert got.activations < block / 8


@pytest.mark.slow
def test_a_line_through_two_depths_is_exact():
    subject = Subject.of(llama(9, hidden_size=32, intermediate_size=64), task="causal-lm")
    small = {"full": {}, "lora": {}, "galore": {"rank": 8}}
    for name, options in small.items():
        plan = Plan(with_options(variant(name), options), 2, 16, devices=2)
        whole = rehearse(subject, plan)
        short = _extend(rehearse(subject, plan, 4), rehearse(subject, plan, 6), 9)
        for step in (1, 2):
            most = [max(p.total for key, p in r.peaks.items() if key[0] == step) for r in (short, whole)]
            assert most[0] == pytest.approx(most[1], rel=1e-9), (name, step)


def test_nothing_is_left_behind():
    before = torch.UntypedStorage.resize_
    predict(llama(), "lora", 2)
    assert not dist.is_initialized()
    assert torch.UntypedStorage.resize_ is before
    assert predict(llama(), "lora", 1) == predict(llama(), "lora", 1)


def inside(rank, world):
    try:
        predict(llama(), "lora", 2)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.slow
def test_a_process_of_several_is_refused():
    assert "devices must be 1 inside a process group" in in_processes(inside)


def trained(rank, *case):
    """The least and the largest peak of several trainings in this process.

    A thread of gloo frees what it has sent when it comes to it, sooner or later, and the profiler does not see that it did.
    """
    found = [trained_once(rank, *case) for _ in range(2)]
    return min(least for least, _ in found), max(most for _, most in found)


def trained_once(rank, config, method, checkpointing, accumulate):
    """The peak of a first step, which creates the optimizer's state, or of a later one: the least of these, and the largest."""
    torch.manual_seed(0)
    task = task_of(config)
    model = build(config, task).train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    batches = [batch_of(config, 10 * rank + seed) for seed in range(2)]
    head = head_modules(model, task)
    applied = apply(variant(method), model, lr=1e-3, steps=100, head=head, batches=iter(batches), loss_fn=loss_of)
    applied.model.train()
    shard(applied.model)
    optimizer = applied.start(1e-3)
    applied.model.zero_grad(set_to_none=True)

    def step():
        for _ in range(accumulate):
            (applied.loss(batches[0], loss_of).total / accumulate).backward()
        optimizer.step()
        applied.after_step(optimizer)
        optimizer.zero_grad()

    held = {"model": applied.model, "optimizer": optimizer, "tensors": batches[0].values()}
    first, *later = (measure(step, **held).bytes for _ in range(4))
    return max(first, min(later)), max(first, *later)


CASES = [
    *((llama(3, hidden_size=192, intermediate_size=512), method, False, 1) for method in METHODS),
    (bert(3), "full", False, 1),
    (bert(3), "lora", False, 1),
    (llama(3), "full", True, 1),
    (llama(3), "full", False, 2),
]


def all_trained(rank, world):
    return [trained(rank, *case) for case in CASES]


@pytest.mark.slow
def test_forecasts_are_what_two_processes_need():
    for (config, method, checkpointing, accumulate), (least, most) in zip(CASES, in_processes(all_trained), strict=True):
        got = predict(config, method, 2, gradient_checkpointing=checkpointing, accumulate=accumulate)
        case = config.model_type, method, checkpointing, accumulate
        assert 0.99 * least <= got.total <= 1.01 * most, (case, least, most)
        assert most < 1.2 * least, (case, least, most)


def test_units_are_blocks_and_an_embedding_of_its_own():
    tied, own = (build(llama(3, tie_word_embeddings=tie), "causal-lm") for tie in (True, False))
    assert set(units(tied)) == set(tied.model.layers)
    assert set(units(own)) == {*own.model.layers, own.model.embed_tokens}
    plain = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU(), torch.nn.Linear(2, 2))
    assert units(plain) == [plain[2], plain[0]]


def test_sharding_needs_a_process_group():
    with pytest.raises(RuntimeError, match="torchrun"):
        shard(torch.nn.Linear(2, 2))

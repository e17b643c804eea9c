"""Forecasts of a quantized base and of 8-bit AdamW against what training takes."""

import pytest
import torch
from subjects import batch_of, llama, loss_of, task_of, train

from lowdim.catalogue import variant
from lowdim.errors import UnknownNameError
from lowdim.methods import apply
from lowdim.models import build
from lowdim.modules import quantize_base
from lowdim.plan import forecast, measure

pytest.importorskip("transformers")

EXTRA = {"int8": "torchao", "int4": "torchao", "nf4": "bitsandbytes"}
SIZES = {"batch_size": 8, "sequence_length": 64}
CONFIG = llama(1, hidden_size=256, intermediate_size=688)


def trained(scheme, *, dtype=torch.float32, checkpointing=False, **setup):
    """What two steps of LoRA take over a quantized base, and the bytes of its weights."""
    model = quantize_base(build(CONFIG, "causal-lm").to(dtype).train(), scheme)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    applied = apply(variant("lora"), model, lr=1e-3, steps=100, **setup)
    optimizer, batch = applied.start(1e-3), batch_of(CONFIG)

    def run():
        for _ in range(2):
            applied.loss(batch, loss_of).total.backward()
            optimizer.step()
            optimizer.zero_grad()

    tensors = [*model.parameters(), *model.buffers()]
    return measure(run, model=model, optimizer=optimizer, tensors=batch.values()).bytes, sum(t.nbytes for t in tensors)


@pytest.mark.parametrize("scheme", list(EXTRA))
@pytest.mark.parametrize("how", [{}, {"dtype": torch.bfloat16}, {"gradient_checkpointing": True}], ids=str)
def test_a_quantized_base(scheme, how):
    pytest.importorskip(EXTRA[scheme])
    got = forecast(CONFIG, "lora", task="causal-lm", quantize=scheme, **SIZES, **how)
    real, weights = trained(scheme, dtype=how.get("dtype", torch.float32), checkpointing="gradient_checkpointing" in how)
    assert got.weights == pytest.approx(weights, rel=1e-3)  # model.to(bfloat16) rounds frequencies that no file holds
    assert got.total == pytest.approx(real, rel=0.01)
    assert got.quantize == scheme


def test_fewer_bits_need_less():
    totals = [forecast(CONFIG, "lora", task="causal-lm", quantize=q, **SIZES).weights for q in (None, "int8", "int4", "nf4")]
    assert totals == sorted(totals, reverse=True)
    assert totals[1] < 0.5 * totals[0]


def test_deep_models_are_extrapolated():
    deep = llama(12, hidden_size=64, intermediate_size=160)
    got = forecast(deep, "lora", task="causal-lm", quantize="int8", **SIZES)
    assert got.depths == (2, 3)
    assert got.weights < forecast(deep, "lora", task="causal-lm", **SIZES).weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_8_bit_adamw(dtype):
    got = forecast(CONFIG, "full", task=task_of(CONFIG), optimizer="adamw8bit", dtype=dtype, **SIZES)
    real, applied = train(CONFIG, variant("full"), dtype=dtype, optimizer="adamw8bit")
    assert got.total == pytest.approx(real.bytes, rel=0.05)  # a table of codes is kept for the whole process, half a MiB
    assert got.optimizer_state == pytest.approx(2 * applied.trained(), rel=0.03)
    assert got.optimizer == "adamw8bit"


def test_bad_input():
    with pytest.raises(UnknownNameError, match=r"quantize must be one of int8, int4, nf4; got 'int2'"):
        forecast(CONFIG, "lora", task="causal-lm", quantize="int2")
    with pytest.raises(UnknownNameError, match=r"optimizer must be one of adamw, adamw8bit; got 'sgd'"):
        forecast(CONFIG, "lora", task="causal-lm", optimizer="sgd")
    with pytest.raises(ValueError, match=r"GaLore trains the base's own weights.*leave out --quantize nf4"):
        forecast(CONFIG, "galore", task="causal-lm", quantize="nf4")
    with pytest.raises(ValueError, match="GaLore has its own optimizer"):
        forecast(CONFIG, "galore", task="causal-lm", optimizer="adamw8bit")

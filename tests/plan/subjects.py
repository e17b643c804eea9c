"""Small models and real training runs that the tests of lowdim.plan share."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from torch.nn import functional as F

from lowdim.catalogue import Variant, variants
from lowdim.methods import apply
from lowdim.models import build, head_modules
from lowdim.plan import measure

BATCH, LENGTH = 8, 64


def llama(layers: int = 2, **more):
    from transformers import LlamaConfig

    sizes = {"hidden_size": 128, "intermediate_size": 344, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaConfig(num_hidden_layers=layers, vocab_size=500, **{**sizes, **more})


def bert(layers: int = 2, **more):
    """The shape of MiniLM, thinner."""
    from transformers import BertConfig

    sizes = {"hidden_size": 192, "intermediate_size": 768, "num_attention_heads": 12}
    return BertConfig(num_hidden_layers=layers, vocab_size=1000, **{**sizes, **more})


def task_of(config) -> str:
    return "causal-lm" if config.model_type == "llama" else "classify"


def built_methods() -> list[Variant]:
    """The methods of the catalogue that can be imported today."""
    found = []
    for chosen in variants().values():
        try:
            chosen.build() if chosen.target else None
        except (ImportError, AttributeError):
            continue
        found.append(chosen)
    return found


def batch_of(config, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, config.vocab_size, (BATCH, LENGTH), generator=generator)
    if task_of(config) == "causal-lm":
        return {"input_ids": ids, "labels": ids.clone()}
    mask = torch.ones_like(ids)
    mask[0, LENGTH // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.randint(0, 2, (BATCH,), generator=generator)}


def loss_of(model, batch):
    return model(**batch).loss


def train(
    config,
    chosen: Variant,
    steps: int = 2,
    *,
    checkpointing: bool = False,
    dtype: torch.dtype = torch.float32,
    accumulate: int = 1,
    bf16: bool = False,
    **setup,
):
    """Really train for a few steps of `accumulate` batches each, under accelerate's autocast if asked; returns what it took."""
    task = task_of(config)
    model = build(config, task).to(dtype).train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    batches = [batch_of(config, seed) for seed in range(2)]
    head = head_modules(model, task)
    setup |= {"lr": 1e-3, "steps": 100, "head": head, "accumulate": accumulate}
    applied = apply(chosen, model, batches=iter(batches), loss_fn=loss_of, **setup)
    applied.model.train()
    if bf16:
        _autocast(applied.model)
    optimizer = applied.start(1e-3)  # hooks for layerwise updates come with it
    applied.model.zero_grad(set_to_none=True)
    batch = batches[0]

    def run():
        for _ in range(steps):
            for _ in range(accumulate):
                (applied.loss(batch, loss_of).total / accumulate).backward()
            optimizer.step()
            applied.after_step(optimizer)
            optimizer.zero_grad()

    return measure(run, model=applied.model, optimizer=optimizer, tensors=batch.values()), applied


def _autocast(model) -> None:
    """Give a model the forward pass that accelerate trains in bfloat16; the process keeps the state that it had."""
    kept = {state: dict(state._shared_state) for state in (PartialState, AcceleratorState)}
    AcceleratorState._reset_state(True)
    Accelerator(mixed_precision="bf16", cpu=True).prepare_model(model)
    for state, values in kept.items():
        state._shared_state.clear()
        state._shared_state.update(values)


class Convolutions(torch.nn.Module):
    """A model that is no transformer."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Conv2d(3, 16, 3, padding=1)
        self.second = torch.nn.Conv2d(16, 16, 3, padding=1)
        self.classifier = torch.nn.Linear(16, 4)

    def forward(self, x):
        return self.classifier(F.relu(self.second(F.relu(self.first(x)))).mean((2, 3)))

"""A step that is not run again, since it would be the first one again, has the peaks that it has when it is run."""

from contextlib import nullcontext

import pytest
from subjects import built_methods, llama

from lowdim.catalogue import variant
from lowdim.plan import rehearse as module
from lowdim.plan.fake import Subject
from lowdim.plan.rehearse import Plan, rehearse

pytest.importorskip("transformers")

#: Methods with a schedule, a choice of ranks, a search or a term in the loss: their steps differ, and each one is run.
DIFFER = {"lamda", "lamda++", "sora", "allora", "sara", "increlora", "maestro", "sst", "nm-decay", "pst", "q-galore"}
DIFFER |= {"low-rank-restart", "self-guided"}


def numbers(rehearsal):
    peaks = {key: (peak.total, peak.by_kind) for key, peak in rehearsal.peaks.items()}
    return list(peaks), peaks, {name: value for name, value in rehearsal.amounts.items() if name != "seconds"}


def cases() -> list:
    """The usual methods, with and without accumulation; the rest is slow."""
    usual = ("lora", "full", "galore", "lamda")
    chosen = [v for v in built_methods() if v.name != "linear-probe"]
    found = [pytest.param(v, 1, id=v.name, marks=[pytest.mark.slow] * (v.name not in usual)) for v in chosen]
    return found + [pytest.param(v, 3, id=f"{v.name}-accumulated") for v in chosen if v.name in usual[:3]]


@pytest.mark.parametrize(("chosen", "accumulate"), cases())
def test_all_steps_run_and_one_step_run_are_the_same(chosen, accumulate, monkeypatch):
    subject = Subject.of(llama(1, hidden_size=64, intermediate_size=96), task="causal-lm")
    plan = Plan(chosen, 2, 16, accumulate=accumulate)
    short = rehearse(subject, plan)
    passes = []
    usual = module._Steps._pass
    monkeypatch.setattr(module._Steps, "_pass", lambda self, step: (passes.append(step), usual(self, step))[1])
    rehearse(subject, plan)
    assert (len(passes) > 1) == (chosen.name in DIFFER)
    monkeypatch.setattr(module, "_only_steps", lambda applied: False)
    monkeypatch.setattr(module, "first_of_alike", lambda *given: nullcontext())
    assert numbers(short) == numbers(rehearse(subject, plan))


def test_layerwise_updates_are_always_run(monkeypatch):
    passes = []
    usual = module._Steps._pass
    monkeypatch.setattr(module._Steps, "_pass", lambda self, step: (passes.append(step), usual(self, step))[1])
    rehearse(Subject.of(llama(1), task="causal-lm"), Plan(variant("galore"), 2, 16, layerwise=True))
    assert passes == [1, 2, 3]

import dataclasses
import io

import pytest
import torch
from rich.console import Console
from subjects import bert, built_methods, llama

from lowdim.catalogue import variant
from lowdim.errors import NoMatchingModuleError
from lowdim.methods import with_options
from lowdim.plan import forecast, shows, table

pytest.importorskip("transformers")


def text(shown) -> str:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(shown)
    return console.export_text()


def few():
    return [forecast(bert(), name, batch_size=2, sequence_length=8) for name in ("full", "lora")]


def test_table_lists_by_need_with_the_verdict():
    found = few()
    limit = min(f.total for f in found)
    shown = text(table(found, limit))
    assert shown.index("LoRA") < shown.index("Full fine-tuning")
    least, most = (next(line for line in shown.splitlines() if label in line) for label in ("LoRA", "Full"))
    assert "yes" in least
    assert "no" in most
    assert "Not counted" in shown


def test_table_fits_a_terminal_of_80_columns():
    sizes = {"weights": 12 * 2**30, "gradients": 12 * 2**30, "total": 900 * 2**30, "file_bytes": 999 * 2**20}
    found = [dataclasses.replace(f, label="Full fine-tuning", trained_parameters=123_456_789, **sizes) for f in few()]
    shown = text(table(found, "24GiB"))
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= 80
    rows = [line for line in shown.splitlines() if line.startswith("Full fine-tuning")]
    assert len(rows) == 2
    assert rows[0].split()[2:5] == ["123M", "12", "12"]


def test_steps_are_shown_as_times():
    found = few()[:1]
    for seconds, shown in ((0.0042, "4.20 ms"), (101.0, "101 s"), (119.0, "119 s"), (5000.0, "83.3 min"), (2e5, "2.31 days")):
        assert shown in text(table([dataclasses.replace(found[0], seconds_per_step=seconds)]))


def test_the_caption_says_what_a_step_is_and_what_is_not_counted():
    found = [forecast(bert(), "lora", batch_size=2, sequence_length=8, accumulate=4)]
    shown = " ".join(text(table(found)).split())
    assert f"batch 2 of 8 tokens, 4 batches a step, vocabulary {bert().vocab_size:,}" in shown
    for word in ("allocator", "context", "data"):
        assert word in shown[shown.index("Not counted") :]


def test_table_without_a_budget_has_no_verdict():
    assert "fits" not in text(table(few()))


def test_empty_table():
    assert "peak" in text(table([], "1GiB"))


def test_layers_of_lora():
    found = shows(bert(), with_options(variant("lora"), {"target_modules": ["query", "value"]}))
    names = [t.name for t in found]
    assert names[0] == "bert.encoder.layer.0.attention.self.query"
    assert len(found) == 5
    assert names[-1] == "classifier"
    assert found[0].to_dict() == {
        "name": names[0], "kind": "Linear", "shape": [192, 192], "trained": 8 * (192 + 192)
    }  # fmt: skip


@pytest.mark.parametrize("chosen", [v for v in built_methods() if v.name != "linear-probe"], ids=lambda v: v.name)
def test_every_method_shows_something(chosen):
    found = shows(llama(1), chosen, task="causal-lm")
    assert found
    assert len({t.name for t in found}) == len(found)


def test_probe_shows_its_head():
    (head,) = shows(bert(), "linear-probe", num_labels=5)
    assert (head.name, head.shape, head.trained) == ("classifier", (5, 192), 5 * 192 + 5)


def test_nothing_matched_is_an_error():
    with pytest.raises(NoMatchingModuleError, match="nearest names"):
        shows(torch.nn.Sequential(torch.nn.Linear(3, 3)), with_options(variant("lora"), {"target_modules": ["q"]}))

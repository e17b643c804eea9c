"""`lowdim run` over a quantized base and with 8-bit AdamW: what is written, loaded, resumed, exported and refused."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

import lowdim
from killing import Kill
from lowdim import models
from lowdim.errors import CheckpointError
from lowdim.modules import QuantizedLinear, quantized_scheme
from lowdim.train.recipes import Recipe
from lowdim.train.run import load_run, run_recipe

EXTRA = {"int8": "torchao", "int4": "torchao", "nf4": "bitsandbytes"}
schemes = pytest.mark.parametrize("scheme", list(EXTRA))


@pytest.fixture(scope="module")
def recipe(bert_folder, two_classes):
    def make(out, **changes):
        keys = {
            "model": str(bert_folder), "data": str(two_classes), "steps": 6, "batch_size": 8, "max_length": 16, "lr": 1e-2,
            "save_steps": 2, "out": str(out),
        }  # fmt: skip
        return Recipe(**{**keys, **changes})

    return make


@pytest.fixture(scope="module")
def made(recipe, tmp_path_factory):
    """Runs that nothing disturbed, made once each."""
    known = {}

    def get(**changes):
        key = json.dumps(changes, sort_keys=True)
        if key not in known:
            if "quantize" in changes:
                pytest.importorskip(EXTRA[changes["quantize"]])
            folder = tmp_path_factory.mktemp("run") / "out"
            known[key] = folder, run_recipe(recipe(folder, **changes))
        return known[key]

    return get


@schemes
def test_the_adapter_names_its_base_and_loads_over_it(scheme, made):
    folder, record = made(quantize=scheme)
    assert record["recipe"]["quantize"] == scheme
    assert json.loads((folder / "adapter" / "adapter.json").read_text())["base_model"]["quantize"] == scheme
    adapted, _, _ = load_run(folder)
    assert quantized_scheme(adapted.model) == scheme
    from lowdim.jobs.adapted import load_adapted

    name, again = load_adapted(folder / "adapter")
    assert name == record["recipe"]["model"]
    x = torch.randint(4, 20, (2, 7))
    assert torch.equal(again.model.eval()(input_ids=x).logits, adapted.model.eval()(input_ids=x).logits)
    dense = models.load_model(name, "classify")
    with pytest.raises(CheckpointError, match=f"lowdim {scheme} when the adapter was trained, and is float32 here"):
        lowdim.load_adapter(dense, folder / "adapter")


@pytest.mark.parametrize("changes", [{"quantize": "int4"}, {"optimizer": "adamw8bit"}], ids=str)
def test_killed_and_resumed_to_the_same_bits(changes, made, recipe, tmp_path):
    folder, want = made(**changes)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe(tmp_path, **changes), callbacks=(Kill(3),))
    with pytest.raises(CheckpointError, match="different recipe"):
        run_recipe(recipe(tmp_path), resume=True)
    got = run_recipe(recipe(tmp_path, **changes), resume=True)
    assert got["losses"] == want["losses"]
    assert got["fingerprint"] == want["fingerprint"]
    file = "adapter/adapter.safetensors"
    first, second = (load_file(place / file) for place in (folder, tmp_path))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_full_training_with_8_bits(made):
    _, small = made(method="full", optimizer="adamw8bit", lr=1e-3)
    _, usual = made(method="full", lr=1e-3)
    assert small["losses"] != usual["losses"]
    assert small["losses"][-1] == pytest.approx(usual["losses"][-1], rel=0.05)


def test_the_probes_model_is_written_dense(made):
    from transformers import AutoModelForSequenceClassification

    folder, record = made(quantize="int8", method="linear-probe")
    plain = AutoModelForSequenceClassification.from_pretrained(folder / "model")
    assert not any(isinstance(layer, QuantizedLinear) for layer in plain.modules())
    assert record["file_bytes"] > 0
    base = models.load_model(record["recipe"]["model"], "classify", quantize="int8")
    name = "bert.encoder.layer.0.attention.self.query"
    assert torch.equal(plain.get_submodule(name).weight, base.get_submodule(name).dense_weight())


@pytest.mark.parametrize("format", ["merged", "peft"])
def test_exported(format, made, tmp_path):
    from lowdim.jobs import export
    from lowdim.jobs.export import ExportSettings

    folder, _ = made(quantize="int8")
    if format == "peft":
        pytest.importorskip("peft")
    written = export(ExportSettings(adapter=folder, out=tmp_path / "out", format=format))
    assert written.largest_difference is not None
    assert written.largest_difference < 1e-3
    assert ("quantized weights (int8)" in (tmp_path / "out" / "README.md").read_text()) is (format == "peft")
    adapted, _, _ = load_run(folder)
    x = torch.randint(4, 20, (2, 7))
    want = adapted.model.eval()(input_ids=x).logits
    assert torch.allclose(written.reload().eval()(input_ids=x).logits, want, atol=1e-4)


def test_merging_says_what_became_of_the_layers(made):
    folder, _ = made(quantize="int8")
    adapted, _, _ = load_run(folder)
    count = len(adapted.layers)
    model = adapted.merge()
    assert set(adapted.merge_report.dequantized.values()) == {"float32"}
    assert f"; {count} quantized ones are plain float32 layers now" in adapted.merge_report.summary
    adapted.unmerge()
    assert quantized_scheme(model) == "int8"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "full", "quantize": "int8"}, r"Full fine-tuning trains the base's own weights.*leave out --quantize int8"),
        ({"method": "galore", "quantize": "nf4"}, r"GaLore trains the base's own weights"),
        ({"method": "monarch", "quantize": "int4"}, r"Monarch trains the base's own weights"),
        ({"method": "pst", "quantize": "int4"}, r"PST masks single entries of the base's weights.*leave out --quantize int4"),
        ({"method": "said", "quantize": "int4"}, r"composes the base's weights"),
        ({"method": "galore", "optimizer": "adamw8bit"}, r"GaLore has its own optimizer"),
    ],
)
def test_what_cannot_run_leaves_nothing(changes, message, recipe, tmp_path):
    with pytest.raises(ValueError, match=message):
        run_recipe(recipe(tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def test_random_weights_are_not_quantized(recipe, tmp_path):
    with pytest.raises(ValueError, match="quantize is for a pre-trained base"):
        recipe(tmp_path, quantize="int8", pretrained=False)


def test_losses_are_finite_and_fall(made):
    for scheme in EXTRA:
        _, record = made(quantize=scheme)
        assert all(math.isfinite(loss) for loss in record["losses"])

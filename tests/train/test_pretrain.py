"""Pretraining by recipe: every method, bytes, characters, streams, layer-wise updates; killed and resumed to the same bits."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file

from killing import Kill
from lowdim.catalogue import methods, variant
from lowdim.errors import CheckpointError, DataError, UnknownNameError
from lowdim.methods import strategy_for
from lowdim.models import assets
from lowdim.train.recipes import Recipe
from lowdim.train.run import run_recipe
from lowdim.train.spikes import SpikeAlarm
from lowdim.train.tasks import causal_lm

TRAINING = [v.name for v in methods("training")]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "short.txt"
    file.write_text((assets() / "shakespeare" / "sample.txt").read_text()[:6000])
    return file


@pytest.fixture(scope="module")
def shape(tmp_path_factory):
    """A configuration without weights or tokenizer, small enough to be trained in a moment."""
    from transformers import LlamaConfig

    folder = tmp_path_factory.mktemp("shape") / "small-llama"
    LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    ).save_pretrained(folder)
    return folder


def recipe(out, text, shape, method="galore", **changes):
    keys = {
        "model": str(shape), "task": "pretrain", "tokenizer": "bytes", "data": [str(text)], "method": method, "steps": 8,
        "batch_size": 4, "max_length": 16, "limit": 64, "save_steps": 3, "warmup": 0.0, "schedule": "constant",
    }  # fmt: skip
    return Recipe(**{**keys, **changes}, out=str(out))


def small(method, **more):
    ranked = {"rank": 8} if "rank" in strategy_for(variant(method)).option_names() else {}
    if method in ("galore", "galore-8bit", "q-galore", "fira"):
        ranked["update_interval"] = 3
    return {**ranked, **more}


def trained(folder):
    return load_file(folder / "model" / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def killed_and_resumed(tmp_path, *arguments, **changes):
    want = run_recipe(recipe(tmp_path / "whole", *arguments, **changes))
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe(tmp_path / "cut", *arguments, **changes), callbacks=(Kill(5),))
    got = run_recipe(recipe(tmp_path / "cut", *arguments, **changes), resume=True)
    assert got["losses"] == want["losses"]
    for key in ("validation", "test", "evaluations", "subspaces"):
        assert got[key] == want[key], key
    assert same(trained(tmp_path / "cut"), trained(tmp_path / "whole"))
    return got


@pytest.mark.parametrize("method", TRAINING)
def test_every_method_pretrains_and_resumes(method, text, shape, tmp_path):
    record = killed_and_resumed(tmp_path, text, shape, method, options=small(method))
    assert record["validation"] < record["before"] < 400
    assert record["metric"] == "perplexity"
    assert record["lr"] == (variant(method).scratch_rates or variant(method).rates)[0]


@pytest.mark.parametrize("method", ["galore", "galore-8bit", "q-galore"])
def test_layerwise_with_accumulation_and_clipping(method, text, shape, tmp_path):
    """The same training whether gradients are kept until the step or not, but for the order of sums."""
    options = small(method, stagger=True)
    how = {"gradient_accumulation": 2, "max_grad_norm": 0.5, "options": options, "lr": 0.01}
    record = killed_and_resumed(tmp_path, text, shape, method, layerwise=True, **how)
    # Without layerwise a trainer clips full gradients: switched off, only accumulation is compared.
    plain = run_recipe(recipe(tmp_path / "plain", text, shape, method, **{**how, "max_grad_norm": 0.0}))
    free = run_recipe(recipe(tmp_path / "free", text, shape, method, layerwise=True, **{**how, "max_grad_norm": 0.0}))
    assert free["losses"] == pytest.approx(plain["losses"], rel=1e-3)
    assert record["losses"] != free["losses"], "clipping changed nothing"
    assert "projected_norm" in record["subspaces"][0]
    assert "true_grad_norm" not in record["subspaces"][0], "of summed projected gradients it is not known"


def test_frequencies_of_a_stream_are_those_of_its_first_blocks():
    """It has no end; a block of two tokens, each of which counts once more."""
    drawn = []

    def blocks():
        while True:
            drawn.append(1)
            yield {"input_ids": [0, 1 + len(drawn) % 2]}

    found = causal_lm._frequencies(blocks(), 4).exp()
    assert len(drawn) == 8192
    want = torch.tensor([8193.0, 4097.0, 4097.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(found, want / want.sum())


def test_a_stream_resumes(shape, tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "train.jsonl").write_text("\n".join(json.dumps({"text": f"row {i} of a text, {i * i}"}) for i in range(900)))
    record = killed_and_resumed(tmp_path, f"datasets:{folder}", shape, options=small("galore"), limit=None)
    assert "train" not in record["data"]


def test_characters(text, shape, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    record = run_recipe(recipe(tmp_path / "out", text, shape, "fira", tokenizer="characters", options=small("fira")))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    letters = set(text.read_text())
    assert len(tokenizer) == len(letters) + 3
    assert model.config.vocab_size == len(tokenizer)
    assert tokenizer.decode(tokenizer("To be")["input_ids"]) == "To be"
    assert record["data"]["train"] == 64


def test_evaluations_during_training_and_what_is_monitored(text, shape, tmp_path):
    told = []
    out = recipe(tmp_path / "out", text, shape, options=small("galore"), eval_steps=3, save_steps=0)
    record = run_recipe(out, say=told.append)
    assert [step for step, _ in record["evaluations"]] == [3, 6]
    shown = [line for line in told if "validation perplexity" in line and line.startswith("step")]
    for line, (step, loss) in zip(shown, record["evaluations"], strict=True):
        seen = record["subspaces"][step - 1]
        more = f"captured {seen['captured']:.3g}; overlap with the last subspaces {seen['overlap']:.3g}"
        assert line == f"step {step}: validation perplexity {math.exp(loss):.4f}; {more}"
    assert record["loss_steps"] == list(range(1, 9)), "a score must not cost a loss"
    assert record["spikes"] == []
    first = record["subspaces"][0]
    assert first["step"] == 1
    assert first["true_grad_norm"] > 1.1, "before it was clipped to 1"
    assert first["true_grad_norm"] >= first["projected_norm"] > 0
    assert 0 < first["captured"] <= 1
    assert 0 < record["subspaces"][3]["overlap"] <= 1


def test_a_spike_is_reported(text, shape, tmp_path, monkeypatch):
    from lowdim.train import monitoring

    monkeypatch.setattr(monitoring, "SpikeAlarm", lambda: SpikeAlarm(patience=2))
    told = []
    how = {"options": {}, "lr": 3.0, "save_steps": 0, "max_grad_norm": 0.0, "steps": 6}
    record = run_recipe(recipe(tmp_path / "out", text, shape, "full", **how), say=told.append)
    assert record["spikes"]
    assert any(f"step {record['spikes'][0]}: the loss jumped to" in line for line in told)


def test_total_batch(text, shape, tmp_path, monkeypatch):
    from lowdim.train.run import accumulate

    assert accumulate(recipe(tmp_path, text, shape, total_batch=12)) == 3
    assert accumulate(recipe(tmp_path, text, shape, gradient_accumulation=5)) == 5
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert accumulate(recipe(tmp_path, text, shape, total_batch=12)) == 1
    with pytest.raises(ValueError, match=r"total_batch must be a multiple of batch_size x processes = 4 x 3; got 8"):
        run_recipe(recipe(tmp_path / "out", text, shape, total_batch=8))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"method": "sltrain", "layerwise": True}, ValueError, "layerwise updates need a lowdim.optim method"),
        ({"method": "fira", "layerwise": True}, ValueError, "max_norm=1.0.*full gradient"),
        ({"model": "llama-tiny", "tokenizer": None}, UnknownNameError, "a shape without a tokenizer; choose one: bytes"),
        ({"model": "llama-tiny", "task": "causal-lm"}, UnknownNameError, "shape without weights; it can be pretrained only"),
        ({"tokenizer": "characters", "data": ["datasets:somewhere"]}, DataError, "needs all text in advance"),
    ],
)
def test_what_cannot_run(changes, error, message, text, shape, tmp_path):
    changes = {"options": small(changes.get("method", "galore")), **changes}
    with pytest.raises(error, match=message):
        run_recipe(recipe(tmp_path / "out", text, shape, **changes))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["galore", "q-galore", "fira", "dct"])
def test_as_an_optimizer_of_a_plain_trainer(method, text, shape, tmp_path):
    """`Trainer(optimizers=(optimizer, schedule))`, layer-wise, without anything of lowdim.train in the loop."""
    from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments, get_scheduler

    from lowdim.catalogue import variant
    from lowdim.optim import param_groups
    from lowdim.train.packing import pretraining
    from lowdim.train.tokenizers import byte_tokenizer

    task = pretraining(byte_tokenizer(), [text], length=16, cache=tmp_path / "cache")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(shape))
    cls = variant(method).build()
    if hasattr(cls, "prepare_model"):
        model = cls.prepare_model(model, rank=8)
    optimizer = cls(param_groups(model, rank=8), lr=0.01, layerwise=True)
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"), max_steps=12, per_device_train_batch_size=8, logging_steps=1, save_strategy="no",
        report_to="none", disable_tqdm=True, use_cpu=True, max_grad_norm=0.0,
    )  # fmt: skip
    schedule = get_scheduler("constant", optimizer)
    trainer = Trainer(model, arguments, train_dataset=task.train, data_collator=task.collate, optimizers=(optimizer, schedule))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("file", ["companion.pt", "optimizer.pt", "model.safetensors", "rng_state.pth"])
@pytest.mark.parametrize("harm", ["cut", "gone"])
def test_a_damaged_checkpoint_says_how_to_continue(file, harm, text, shape, tmp_path):
    """And going on from the one before gives what an uninterrupted run gives."""
    how = {"options": {"rank": 8, "steps_per_iteration": 3}, "save_steps": 2}
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe(tmp_path / "cut", text, shape, "sst", **how), callbacks=(Kill(5),))
    folder = tmp_path / "cut" / "checkpoints" / "checkpoint-4"
    if harm == "cut":
        (folder / file).write_bytes((folder / file).read_bytes()[:100])
    else:
        (folder / file).unlink()
    with pytest.raises(
        CheckpointError, match=r"checkpoint-4\S+ is (damaged|missing).*remove that folder, and --resume continues"
    ):
        run_recipe(recipe(tmp_path / "cut", text, shape, "sst", **how), resume=True)
    shutil.rmtree(folder)
    got = run_recipe(recipe(tmp_path / "cut", text, shape, "sst", **how), resume=True)
    want = run_recipe(recipe(tmp_path / "whole", text, shape, "sst", **how))
    assert got["losses"] == want["losses"]
    assert same(trained(tmp_path / "cut"), trained(tmp_path / "whole"))


def test_layers_that_stay_dense_are_reported(text, tmp_path):
    """A key projection of 8 rows has no factors of rank 8 that would be smaller."""
    from transformers import LlamaConfig

    shape = tmp_path / "shape"
    heads = {"num_attention_heads": 4, "num_key_value_heads": 1}
    LlamaConfig(vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=1, **heads).save_pretrained(shape)
    told = []
    run_recipe(
        recipe(tmp_path / "out", text, shape, "sltrain", options=small("sltrain"), save_steps=0, steps=2), say=told.append
    )
    assert any("2 layers stay dense" in line and "k_proj" in line and "v_proj" in line for line in told), told

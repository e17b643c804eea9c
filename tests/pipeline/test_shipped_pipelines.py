"""The shipped recipes run from their first step to their last, on tiny models in the shape of theirs."""

import runpy
import shutil

import pytest
import torch

import tiny
from lowdim import models
from lowdim.pipeline import load_pipeline, run_pipeline
from snippets import ROOT

transformers = pytest.importorskip("transformers")
pytest.importorskip("torchao")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:few calibration tokens")]
FOLDER = ROOT / "recipes" / "compress"


def small(path, out, model, **changes):
    """The recipe with another model, and few steps of tuning."""
    recipe = load_pipeline(path, model=str(model), out=str(out), **changes)
    steps = [step.model_copy(update={"steps": 2}) if step.step == "tune" else step for step in recipe.steps]
    return recipe.model_copy(update={"steps": steps})


def test_smollm2(tmp_path):
    """A Llama with grouped-query attention and heads of 64, as in SmolLM2."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 2, "vocab_size": 512, "head_dim": 64}
    config = LlamaConfig(**sizes, num_attention_heads=3, num_key_value_heads=1, tie_word_embeddings=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    models.load_tokenizer("stories260k").save_pretrained(tmp_path / "llama")
    record = run_pipeline(small(FOLDER / "smollm2.yaml", tmp_path / "out", tmp_path / "llama"))
    assert [step.step for step in record.steps[1:]] == ["decompose", "tune", "cache", "sparsify", "quantize", "export"]
    first, decomposed, last = record.steps[0], record.steps[1], record.steps[-1]
    assert decomposed.disk_bytes == pytest.approx(0.85 * first.disk_bytes, rel=0.01)
    attention, bases = (
        2 * 4 * 96 * 64 * (3 + 1 + 1 + 3),
        2 * 4 * 2 * 64 * 64,
    )  # bytes: layers, float32, q k v o; keys and values
    assert last.disk_bytes == pytest.approx(decomposed.disk_bytes + bases - 3 / 4 * attention, rel=0.02)
    assert 2 * last.cache_bytes == first.cache_bytes
    assert not [note for step in record.steps for note in step.notes], "no narrow projection is cut"


def test_minilm(tmp_path):
    tiny.save_bert(tmp_path / "bert", pooled=True)
    runpy.run_path(str(ROOT / "recipes" / "make_texts.py"))["main"](tmp_path / "data")
    pairs = tmp_path / "data" / "pairs.jsonl"
    record = run_pipeline(small(FOLDER / "minilm.yaml", tmp_path / "out", tmp_path / "bert", data=str(pairs)))
    assert record.metric == "spearman"
    assert record.steps[-1].disk_bytes < 0.8 * record.steps[0].disk_bytes
    shutil.rmtree(tmp_path / "bert")  # the folder that is written needs nothing else
    assert transformers.AutoModel.from_pretrained(tmp_path / "out" / "model")

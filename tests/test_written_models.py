"""What a command writes is the model that was measured: it is loaded again before success is reported."""

import contextlib
import dataclasses

import pytest
import torch
from torch import nn

import lowdim
import tiny
from lowdim import models
from lowdim.adapters import Adapted, LoRA
from lowdim.compress import LoRDConfig, WeLoreConfig, lord, welore
from lowdim.errors import WrittenModelError
from lowdim.export import export
from lowdim.jobs import CompressSettings, compress
from lowdim.pretrained import save_compressed
from lowdim.train.loading import cast_stored
from lowdim.train.recipes import Recipe
from lowdim.train.run import run_recipe

NOT_THE_MODEL = "does not give the model that was measured"
SHAKESPEARE = "lowdim:shakespeare"


def recipe(out, **changes):
    how = {"model": "stories260k", "task": "causal-lm", "data": [SHAKESPEARE], "method": "lora", "steps": 2, "limit": 40}
    return Recipe(**{**how, "max_length": 16, "batch_size": 4, "save_steps": 0, "out": str(out), **changes})


@contextlib.contextmanager
def disturbed(parameter):
    """Another number in a parameter, as a writer that loses it would leave."""
    with torch.no_grad():
        parameter.view(-1)[:8].add_(1.0)
        try:
            yield
        finally:
            parameter.view(-1)[:8].sub_(1.0)


@pytest.fixture
def lossy_save(monkeypatch):
    """Models of transformers are written with another weight than they have."""
    from transformers import PreTrainedModel

    plain = PreTrainedModel.save_pretrained

    def save(self, *args, **kwargs):
        with disturbed(next(p for n, p in self.named_parameters() if n.endswith("norm.weight"))):
            return plain(self, *args, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", save)


@pytest.fixture
def other_config(monkeypatch):
    """Models of transformers are written with all their tensors and another configuration."""
    from transformers import PreTrainedModel

    plain = PreTrainedModel.save_pretrained

    def save(self, *args, **kwargs):
        before, self.config.rms_norm_eps = self.config.rms_norm_eps, 1.0
        try:
            return plain(self, *args, **kwargs)
        finally:
            self.config.rms_norm_eps = before

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", save)


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()) if folder.exists() else []


def test_a_run_checks_the_adapter_that_it_wrote(tmp_path, monkeypatch):
    run_recipe(recipe(tmp_path / "right"))
    plain = Adapted.save

    def save(self, folder):
        with disturbed(next(iter(self.trainable().values()))), disturbed(list(self.trainable().values())[1]):
            return plain(self, folder)

    monkeypatch.setattr(Adapted, "save", save)
    with pytest.raises(WrittenModelError, match=f"the adapter in .*adapter {NOT_THE_MODEL}"):
        run_recipe(recipe(tmp_path / "wrong"))
    assert not (tmp_path / "wrong" / "adapter").exists()
    assert not (tmp_path / "wrong" / "run.json").exists()


@pytest.mark.parametrize("fault", ["lossy_save", "other_config"])
def test_a_run_checks_the_model_that_it_wrote(fault, tmp_path, request):
    request.getfixturevalue(fault)
    with pytest.raises(WrittenModelError, match=NOT_THE_MODEL):
        run_recipe(recipe(tmp_path / "out", method="full"))
    assert not (tmp_path / "out" / "model").exists()
    assert not (tmp_path / "out" / "run.json").exists()


@pytest.mark.parametrize("fault", ["lossy_save", "other_config"])
def test_an_export_checks_the_merged_model(fault, tmp_path, request):
    adapted = lowdim.adapt(models.load_model("stories260k", "causal-lm"), LoRA(rank=2))
    request.getfixturevalue(fault)
    with pytest.raises(WrittenModelError, match=NOT_THE_MODEL):
        export(adapted, tmp_path / "out", "merged")
    assert files(tmp_path) == []


def test_an_export_checks_the_peft_adapter(tmp_path, monkeypatch):
    pytest.importorskip("peft")
    from lowdim.adapters.core.files import peft

    model = models.load_model("stories260k", "causal-lm")
    adapted = lowdim.adapt(model, LoRA(rank=2))
    with torch.no_grad():
        for parameter in adapted.trainable().values():
            parameter.normal_(std=0.1)
    source = models.resolve("stories260k")
    assert export(adapted, tmp_path / "right", "peft", source=source).largest_difference < 1e-3
    plain = peft.write_tensors
    monkeypatch.setattr(
        peft, "write_tensors", lambda path, tensors, *a: plain(path, {k: 2 * t for k, t in tensors.items()}, *a)
    )
    with pytest.raises(WrittenModelError, match=f"the PEFT adapter {NOT_THE_MODEL}"):
        export(adapted, tmp_path / "wrong", "peft", source=source)
    assert files(tmp_path / "wrong") == []


def test_a_merge_that_goes_wrong_is_found(tmp_path, monkeypatch):
    adapted = lowdim.adapt(models.load_model("stories260k", "causal-lm"), LoRA(rank=2))
    plain = Adapted.merge

    def merge(self):
        model = plain(self)
        nn.init.ones_(model.model.layers[0].self_attn.q_proj.weight)
        return model

    monkeypatch.setattr(Adapted, "merge", merge)
    with pytest.raises(WrittenModelError, match=f"the merged model {NOT_THE_MODEL}"):
        export(adapted, tmp_path / "out", "merged")
    assert files(tmp_path) == []


@pytest.mark.filterwarnings("ignore:few calibration tokens")
def test_a_compression_checks_outputs_and_not_only_tensors(tmp_path, other_config):
    settings = {"model": "stories260k", "data": (SHAKESPEARE,), "samples": 20, "max_length": 16, "options": {"rank_ratio": 0.4}}
    for dense in (False, True):
        with pytest.raises(WrittenModelError, match=f"the checkpoint {NOT_THE_MODEL}"):
            compress(CompressSettings(**settings, out=tmp_path / "out", dense=dense))
        assert files(tmp_path) == []


def comparison():
    from lowdim.comparison import CompareSettings

    return CompareSettings(
        model="stories260k", task="causal-lm", data=(SHAKESPEARE,), methods=("full",), rates=1, seeds=1, steps=3, limit=40,
        max_length=16, batch_size=4,
    )  # fmt: skip


def test_weights_that_were_kept_must_have_the_score_that_was_measured(tmp_path, monkeypatch):
    from lowdim.comparison import compare, runs

    plain = runs.state_of
    monkeypatch.setattr(runs, "state_of", lambda model: {name: 3 * tensor for name, tensor in plain(model).items()})
    with pytest.raises(WrittenModelError, match=r"the weights of seed .*: perplexity \S+ on the validation part, and \S+ was"):
        compare(comparison(), tmp_path / "out")
    assert files(tmp_path / "out" / "winner") == []


def test_the_folder_that_is_handed_over_must_have_the_score_that_was_measured(tmp_path, monkeypatch):
    from lowdim.comparison import compare, winner

    plain = winner.write_winner

    def write(model, folder, base, **how):
        return dataclasses.replace(plain(model, folder, base, **how), reload=lambda: base)  # what was never trained

    monkeypatch.setattr(winner, "write_winner", write)
    with pytest.raises(
        WrittenModelError, match=r"the merged model in \S+winner, loaded again: perplexity \S+ on the validation"
    ):
        compare(comparison(), tmp_path / "out")
    assert files(tmp_path / "out" / "winner") == []


def test_a_comparison_is_kept_when_its_winner_cannot_be_written(tmp_path, lossy_save):
    from lowdim.comparison import compare

    with pytest.raises(WrittenModelError, match=f"is complete, but its winner was not written: .*{NOT_THE_MODEL}"):
        compare(comparison(), tmp_path / "out")
    assert files(tmp_path / "out" / "winner") == []
    record = lowdim.files.read_json(tmp_path / "out" / "comparison.json")
    assert record["winner"] is None
    assert record["methods"][0]["status"] == "ok"
    assert any("the winner was not written" in note for note in record["notes"])


def small_models():
    """Models with and without biases, Conv1D, tied embeddings, encoders, convolutions, two stacks."""
    import transformers as T

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    t5 = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    gpt2 = {"vocab_size": 32, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16, "bos_token_id": 1, "eos_token_id": 2}
    return {
        "llama": tiny.llama(),
        "tied": tiny.llama(tie_word_embeddings=True),
        "gpt2": T.GPT2LMHeadModel(T.GPT2Config(**gpt2)),
        "bert": T.BertForSequenceClassification(T.BertConfig(vocab_size=32, max_position_embeddings=16, **sizes)),
        "t5": T.T5ForConditionalGeneration(T.T5Config(**t5)),
        "vit": T.ViTForImageClassification(T.ViTConfig(image_size=16, patch_size=8, **sizes)),
    }


@pytest.mark.filterwarnings("ignore:few calibration tokens")
@pytest.mark.parametrize("dense", [False, True], ids=["compressed", "dense"])
@pytest.mark.parametrize("name", ["llama", "tied", "gpt2", "bert", "t5", "vit"])
def test_every_kind_of_model_is_written_as_it_was_measured(name, dense, tmp_path):
    for dtype in (torch.float32, torch.bfloat16):
        model = cast_stored(small_models()[name].eval(), dtype)
        probe = models.Probe.of(model)
        if name in ("t5", "vit"):
            model = welore(model, WeLoreConfig(threshold=0.5, min_reduction=0))
        else:
            model = lord(model, LoRDConfig(param_ratio=0.6, centered=name in ("gpt2", "bert")), [probe.inputs] * 8)
        want = models.Probe.of(model)
        assert want.difference(model) == 0.0
        save_compressed(model, tmp_path / str(dtype), dense=dense, max_shard_size="3KB")
        assert len(list((tmp_path / str(dtype)).glob("model-*.safetensors"))) > 1, "in several files"
        again = type(model).from_pretrained(tmp_path / str(dtype), dtype="auto").eval()
        assert want.check(again, name, same=not dense) >= 0.0


def test_a_cast_model_is_the_one_that_is_loaded_again(tmp_path):
    from transformers import LlamaForCausalLM

    model = cast_stored(tiny.llama(), torch.bfloat16).eval()
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    model.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path, dtype="auto").eval()
    ids = torch.arange(3, 19)[None] % 48
    assert torch.equal(model(ids).logits, again(ids).logits)

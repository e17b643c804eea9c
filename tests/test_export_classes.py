"""The loading code of an exported folder's README loads it, for every kind of model, and gives the same logits."""

import pytest
import torch

import lowdim
import tiny
import zoo
from lowdim.adapters import LoRA
from lowdim.export import export
from lowdim.models.classes import class_named, loading_class
from lowdim.testing.closeness import relative_error

pytest.importorskip("peft")


def trained(model, kept=(), targets=None):
    adapted = lowdim.adapt(model, LoRA(rank=2, target_modules=targets), modules_to_save=kept)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in adapted.trainable().values():
            parameter.add_((0.05 * torch.randn(parameter.shape, generator=generator)).to(parameter))
    return adapted


def code_of(folder, monkeypatch):
    """What the README's program has defined, run where a user would run it."""
    monkeypatch.chdir(folder.parent)
    found = {}
    exec((folder / "README.md").read_text().split("```python\n")[1].split("```")[0], found)
    return found


@pytest.mark.parametrize(
    ("name", "loads"),
    [
        ("llama", "AutoModelForCausalLM"),
        ("gpt2", "AutoModelForCausalLM"),
        ("bert", "AutoModel"),
        ("bert-mlm", "AutoModelForMaskedLM"),
        ("bert-classifier", "AutoModelForSequenceClassification"),
        ("bert-tokens", "AutoModelForTokenClassification"),
        ("bert-questions", "AutoModelForQuestionAnswering"),
        ("distilbert-classifier", "AutoModelForSequenceClassification"),
        ("t5", "AutoModelForSeq2SeqLM"),
        ("bart", "AutoModelForSeq2SeqLM"),
        ("whisper", "AutoModelForSpeechSeq2Seq"),
        ("whisper-classifier", "AutoModelForAudioClassification"),
        ("vit-classifier", "AutoModelForImageClassification"),
        ("clip", "AutoModel"),
        ("clip-classifier", "AutoModelForImageClassification"),
        ("wav2vec2-ctc", "AutoModelForCTC"),
        ("modernbert-mlm", "AutoModelForMaskedLM"),
    ],
)
def test_the_readme_loads_the_folder(name, loads, tmp_path, monkeypatch):
    entry, base = zoo.MODELS[name], tmp_path / "base"
    entry.build().save_pretrained(base)
    model = type(entry.build()).from_pretrained(base).eval()
    assert loading_class(model) == ("transformers", loads)
    assert class_named(type(model).__name__) is type(model)
    kept = [entry.head] if entry.head else []
    adapted = trained(model, kept, entry.beside_head or entry.targets)
    batch = entry.batch()
    want = zoo.logits_of(model, batch)
    for kind in ("peft", "merged"):
        result = export(adapted, tmp_path / kind, kind)
        assert relative_error(zoo.logits_of(result.reload().eval(), batch), want) < 1e-5
        again = code_of(tmp_path / kind, monkeypatch)["model"].eval()
        assert relative_error(zoo.logits_of(again, batch), want) < 1e-5


def test_a_class_that_no_auto_class_gives(tmp_path, monkeypatch):
    from transformers import LlamaModel

    class Own(LlamaModel):
        pass

    assert loading_class(Own(zoo.MODELS["llama"].build().config)) == (__name__, "Own")
    model = zoo.MODELS["clip"].build()
    text = type(model.text_model)(model.config.text_config) if hasattr(model, "text_model") else model
    assert loading_class(text)[0].startswith("transformers")


@pytest.mark.parametrize("kind", ["peft", "merged"])
def test_a_model_of_sentence_transformers(kind, tmp_path, monkeypatch):
    library = pytest.importorskip("sentence_transformers")
    base = tiny.save_bert(tmp_path / "base", pooled=True)
    model = library.SentenceTransformer(str(base), device="cpu")
    before = model.encode(["the film was good"])
    adapted = trained(model)
    want = model.encode(["the film was good"])
    result = export(adapted, tmp_path / kind, kind)
    for again in (result.reload(), code_of(tmp_path / kind, monkeypatch)["model"]):
        got = again.to("cpu").encode(["the film was good"])
        assert relative_error(torch.tensor(got), torch.tensor(want)) < 1e-5
    assert relative_error(torch.tensor(want), torch.tensor(before)) > 1e-3


def test_a_merged_model_that_does_not_read_back_is_not_left(tmp_path, monkeypatch):
    from transformers import LlamaForCausalLM

    adapted = trained(zoo.MODELS["llama"].build())
    plain = LlamaForCausalLM.save_pretrained

    def lossy(self, folder, **options):
        with torch.no_grad():
            kept = self.model.norm.weight.clone()
            self.model.norm.weight.mul_(2)
        plain(self, folder, **options)
        with torch.no_grad():
            self.model.norm.weight.copy_(kept)

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", lossy)
    with pytest.raises(lowdim.errors.LowdimError, match="does not give the model that was measured"):
        export(adapted, tmp_path / "out", "merged")
    assert not (tmp_path / "out").exists()

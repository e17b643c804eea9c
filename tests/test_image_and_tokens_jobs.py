"""`lowdim run`, `export` and `compare` for images and for tagged sentences: what they write loads in transformers and PEFT."""

import json

import pytest
import torch
import yaml

from images import save_convnext, save_digits, save_resnet, save_vit
from lowdim.files import read_json
from lowdim.train.run import load_run
from snippets import exit_code
from tagged_sentences import sentences, write_conll


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return save_digits(tmp_path_factory.mktemp("data") / "digits", 120)


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    return save_vit(tmp_path_factory.mktemp("models") / "vit", labels=7)


@pytest.fixture(scope="module")
def conll(tmp_path_factory):
    return write_conll(tmp_path_factory.mktemp("data") / "s.conll", sentences(60))


def run(folder, **recipe):
    """A run of a few steps; returns its record."""
    file = folder.parent / f"{folder.name}.yaml"
    content = {"method": "lora", "steps": 3, "batch_size": 8, "lr": 0.003, "out": str(folder), **recipe}
    file.write_text(yaml.safe_dump(content))
    assert exit_code(["run", str(file)]) == 0
    return read_json(folder / "run.json")


def inputs_of(kind):
    draw = torch.Generator().manual_seed(0)
    if kind == "image":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=draw)}
    ids = torch.randint(4, 20, (2, 9), generator=draw)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@torch.no_grad()
def logits(model, kind):
    return model.eval()(**inputs_of(kind)).logits


@pytest.fixture(scope="module")
def runs(tmp_path_factory, vit, digits, bert_folder, conll):
    root = tmp_path_factory.mktemp("runs")
    given = {"image": (str(vit), str(digits)), "tokens": (str(bert_folder), str(conll))}
    return {
        kind: (root / kind, run(root / kind, task=kind, model=model, data=data), model) for kind, (model, data) in given.items()
    }


@pytest.mark.parametrize("kind", ["image", "tokens"])
def test_a_run_records_its_scores_and_its_data(runs, kind):
    folder, record, _ = runs[kind]
    assert record["metric"] == {"image": "accuracy", "tokens": "entity-f1"}[kind]
    assert record["data"]["baseline"]["name"] == {"image": "majority-class", "tokens": "constant-tag"}[kind]
    assert record["loss_steps"] == [1, 2, 3]
    assert "FILM" in json.dumps(record) if kind == "tokens" else record["data"]["labels"] == [str(i) for i in range(10)]
    assert (folder / "adapter" / "adapter.safetensors").is_file()
    assert (folder / "report.html").is_file()


@pytest.mark.parametrize("kind", ["image", "tokens"])
def test_a_run_exported_to_peft_loads_there_with_equal_logits(runs, kind, tmp_path):
    import transformers
    from peft import PeftModel

    folder, record, base = runs[kind]
    assert exit_code(["export", str(folder), str(tmp_path / "peft")]) == 0
    auto = {"image": "AutoModelForImageClassification", "tokens": "AutoModelForTokenClassification"}[kind]
    count = len(record["data"]["labels"])
    bare = getattr(transformers, auto).from_pretrained(base, num_labels=count, ignore_mismatched_sizes=True)
    trained = load_run(folder)[0].model
    assert torch.allclose(logits(PeftModel.from_pretrained(bare, tmp_path / "peft"), kind), logits(trained, kind), atol=1e-5)
    page = (tmp_path / "peft" / "README.md").read_text()
    assert auto in page
    code = page.split("```python\n")[1].split("```")[0]
    loaded = {}
    exec(code.replace('"peft"', repr(str(tmp_path / "peft"))), loaded)
    assert torch.allclose(logits(loaded["model"], kind), logits(trained, kind), atol=1e-5), "as its README says"


@pytest.mark.parametrize("kind", ["image", "tokens"])
def test_a_run_exported_merged_loads_with_its_processor_and_names(runs, kind, tmp_path):
    import transformers

    folder, record, _ = runs[kind]
    assert exit_code(["export", str(folder), str(tmp_path / "merged"), "--format", "merged"]) == 0
    auto = {"image": "AutoModelForImageClassification", "tokens": "AutoModelForTokenClassification"}[kind]
    loaded = getattr(transformers, auto).from_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(loaded, kind), logits(load_run(folder)[0].model, kind), atol=1e-5)
    assert [loaded.config.id2label[i] for i in range(loaded.config.num_labels)] == record["data"]["labels"]
    processor = {"image": "AutoImageProcessor", "tokens": "AutoTokenizer"}[kind]
    assert getattr(transformers, processor).from_pretrained(tmp_path / "merged")


@pytest.mark.parametrize("kind", ["image", "tokens"])
def test_a_whole_model_is_saved_with_its_processor_and_names(vit, digits, bert_folder, conll, kind, tmp_path):
    import transformers

    model, data = {"image": (vit, digits), "tokens": (bert_folder, conll)}[kind]
    record = run(tmp_path / "full", task=kind, model=str(model), data=str(data), method="full")
    auto = {"image": "AutoModelForImageClassification", "tokens": "AutoModelForTokenClassification"}[kind]
    loaded = getattr(transformers, auto).from_pretrained(tmp_path / "full" / "model")
    assert list(loaded.config.id2label.values()) == record["data"]["labels"]
    processor = {"image": "AutoImageProcessor", "tokens": "AutoTokenizer"}[kind]
    assert getattr(transformers, processor).from_pretrained(tmp_path / "full" / "model")


@pytest.mark.parametrize(("save", "stem"), [(save_resnet, "resnet.embedder"), (save_convnext, "convnext.embeddings")])
def test_flora_on_a_stem_of_three_channels(save, stem, digits, tmp_path):
    model = save(tmp_path / "model")
    record = run(tmp_path / "run", task="image", model=str(model), data=str(digits), method="flora")
    capped = [note for note in record["notes"] if "adapted at" in note]
    assert len(capped) == 1
    assert stem in capped[0]
    adapted = load_run(tmp_path / "run")[0]
    first = next(layer for name, layer in adapted.layers.items() if name.startswith(stem))
    assert first.delta().shape[1] == first.base.weight[0].numel(), "the kernel of three colours, flattened"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["image", "tokens"])
def test_a_comparison_hands_over_a_model_that_loads(vit, digits, bert_folder, conll, kind, tmp_path):
    import transformers

    model, data = {"image": (vit, digits), "tokens": (bert_folder, conll)}[kind]
    command = ["compare", "--task", kind, "--model", str(model), "--data", str(data), "--methods", "linear-probe,lora"]
    assert exit_code([*command, "--steps", "6", "--seeds", "2", "--rates", "1", "--out", str(tmp_path / "out")]) == 0
    record = read_json(tmp_path / "out" / "comparison.json")
    assert {row["name"] for row in record["methods"]} >= {"linear-probe", "lora"}
    constant = {"image": "majority-class", "tokens": "constant-tag"}[kind]
    assert constant in {row["name"] for row in record["methods"]}
    assert (tmp_path / "out" / "report.html").is_file()
    winner = tmp_path / "out" / "winner"
    if record["winner"]["format"] == "merged model":
        auto = {"image": "AutoModelForImageClassification", "tokens": "AutoModelForTokenClassification"}[kind]
        loaded = getattr(transformers, auto).from_pretrained(winner)
        assert list(loaded.config.id2label.values()) == record["data"]["labels"]
        processor = {"image": "AutoImageProcessor", "tokens": "AutoTokenizer"}[kind]
        assert getattr(transformers, processor).from_pretrained(winner)
    else:
        assert (winner / "adapter_config.json").is_file()


@pytest.mark.slow
def test_digits_are_learned(tmp_path):
    vit = save_vit(tmp_path / "vit", hidden_size=64, intermediate_size=128)
    data = save_digits(tmp_path / "digits", 1000)
    how = {"steps": 200, "batch_size": 32, "lr": 0.002, "method": "full", "pretrained": False}
    record = run(tmp_path / "run", task="image", model=str(vit), data=str(data), **how)
    assert record["test"] > 0.7


def test_bad_input_is_one_message(vit, bert_folder, digits, tmp_path, capsys):
    (tmp_path / "a" / "cat").mkdir(parents=True)
    (tmp_path / "a" / "dog").mkdir()
    for name in ("cat", "dog"):
        for i in range(4):
            (tmp_path / "a" / name / f"{i}.png").write_text("no image")
    file = tmp_path / "recipe.yaml"
    for task, model, data, message in (
        ("image", vit, tmp_path / "a", "8 of 8 images cannot be read: cat/0.png (it is no image of a known format)"),
        ("image", bert_folder, digits, "its image processor (preprocessor_config.json) cannot be read"),
        ("tokens", vit, digits, "its tokenizer cannot be read"),
        ("tokens", bert_folder, digits, "sentences with tags are read from"),
    ):
        file.write_text(yaml.safe_dump({"task": task, "model": str(model), "data": str(data), "out": str(tmp_path / "out")}))
        assert exit_code(["run", str(file)]) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert message in said, (task, said)
        assert not (tmp_path / "out").exists()

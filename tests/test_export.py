"""What is exported loads in the tools that people run, and gives the same logits there."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

import tiny
from lowdim import methods, models
from lowdim.catalogue import variant
from lowdim.errors import UnknownNameError
from lowdim.export import export

TOLERANCE = 1e-5  # float32
STORIES = models.resolve("stories260k")


def shaken(applied, scale=0.05):
    """Any trained weights would do; random ones leave nothing at zero."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in applied.model.parameters():
            if p.requires_grad:
                p.add_(scale * p.std().nan_to_num(1.0).clamp_min(0.1) * torch.randn(p.shape, generator=generator).to(p))
    return applied


def ready(model, name, head=(), **options):
    ids = torch.arange(3, 27).view(3, 8)
    batch = {"input_ids": ids, "labels": ids if not head else torch.tensor([0, 1, 0])}
    chosen = methods.with_options(variant(name), options)
    return methods.apply(chosen, model, lr=1e-2, steps=10, head=head, batches=[batch], loss_fn=lambda m, b: m(**b).loss)


@torch.no_grad()
def logits(model):
    ids = torch.tensor([[2, 5, 6, 7, 19, 3], [2, 8, 22, 3, 0, 0]])
    return model.eval()(input_ids=ids, attention_mask=(ids != 0).long()).logits


def difference(a, b):
    return (logits(a) - logits(b)).abs().max().item()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("lora", {"rank": 4}),
        ("lora", {"rank": 4, "target_modules": ["q_proj", "layers.1.mlp.down_proj"]}),
        ("lamda", {"rank": 8}),
        ("lamda++", {"rank": 6, "rank_choices": (4, 6, 8)}),
        ("randlora", {"rank": 8}),
        ("lora-sb", {"rank": 6}),
        ("lora-xs", {"rank": 6}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_a_language_model_in_peft(name, options, tmp_path):
    applied = shaken(ready(models.load_model("stories260k", "causal-lm"), name, **options))
    bare = models.load_model("stories260k", "causal-lm")
    assert difference(applied.model, bare) > 0.01, "the update does something"
    result = export(applied.adapted, tmp_path / "out", source=STORIES)
    assert result.errors == {}
    assert difference(applied.model, result.reload()) < TOLERANCE
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["task_type"] == "CAUSAL_LM"


def test_a_pooled_classifier_in_peft(pooled_folder, tmp_path):
    model = models.load_model(str(pooled_folder), "classify")
    applied = shaken(ready(model, "lora", ("classifier",), rank=4))
    result = export(applied.adapted, tmp_path / "out", source=models.resolve(str(pooled_folder)))
    assert (tmp_path / "out" / "head.safetensors").is_file()
    assert difference(applied.model, result.reload()) < TOLERANCE
    assert "classes" not in result.how_to_load, "nobody named them"


@pytest.mark.parametrize("problem", [None, "multi_label_classification"])
@pytest.mark.parametrize("format", ["peft", "merged"])
def test_the_loading_code_of_a_pooled_classifier_answers_with_the_names_of_the_classes(
    format, problem, pooled_folder, tmp_path, monkeypatch
):
    model = models.load_model(str(pooled_folder), "classify", num_labels=3, problem=problem)
    models.name_classes(model, ("delivery", "login", "it's late"))
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor([-1.0, 2.0, 1.0]))
    applied = ready(model, "lora", ("classifier",), rank=4)
    tokenizer = models.load_tokenizer(str(pooled_folder))
    source = models.resolve(str(pooled_folder))
    result = export(applied.adapted, tmp_path / "out", format, tokenizer=tokenizer, source=source)
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(result.how_to_load, found)
    assert found["answers"] == ([["login", "it's late"]] if problem else ["login"])


@pytest.mark.parametrize("template", [None, "{% for m in messages %}{{ m.content }}{% endfor %}"])
def test_the_loading_code_of_a_language_model_writes_an_answer(template, tmp_path, monkeypatch, capsys):
    model, tokenizer = models.load_model("stories260k", "causal-lm"), models.load_tokenizer("stories260k")
    tokenizer.chat_template = template
    result = export(model, tmp_path / "out", "merged", tokenizer=tokenizer, source=models.resolve("stories260k"))
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(result.how_to_load, found)
    # A template writes special tokens itself; this one writes none.
    text = {"text": "a question", "add_special_tokens": False} if template else {"text": "a text"}
    prompt = tokenizer(**text, return_tensors="pt", return_token_type_ids=False)
    want = model.generate(**prompt, max_new_tokens=32, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert capsys.readouterr().out.strip() == tokenizer.decode(want, skip_special_tokens=True).strip()
    assert ("apply_chat_template" in result.how_to_load) == (template is not None)


def test_the_loading_code_of_a_classifier_in_peft_names_the_classes(bert_folder, tmp_path):
    model = models.load_model(str(bert_folder), "classify", num_labels=2)
    models.name_classes(model, ("no", "yes"))
    result = export(
        ready(model, "lora", ("classifier",), rank=4).adapted, tmp_path / "out", source=models.resolve(str(bert_folder))
    )
    assert "classes = ['no', 'yes']  # in the order of the logits\n" in result.how_to_load


def test_a_transformers_classifier_in_peft(bert_folder, tmp_path):
    model = models.load_model(str(bert_folder), "classify", num_labels=3)
    applied = shaken(ready(model, "lamda", ("classifier",), rank=4))
    result = export(applied.adapted, tmp_path / "out", source=models.resolve(str(bert_folder)))
    assert not (tmp_path / "out" / "head.safetensors").exists(), "PEFT keeps it in modules_to_save"
    assert difference(applied.model, result.reload()) < TOLERANCE


def test_a_decoder_that_classifies_in_peft(tmp_path):
    model = models.load_model("stories260k", "classify", pad_token_id=0)
    applied = shaken(ready(model, "lora", ("score",), rank=4))
    result = export(applied.adapted, tmp_path / "out", source=STORIES)
    assert difference(applied.model, result.reload()) < TOLERANCE


def test_a_new_pooler_goes_along(bert_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(bert_folder, tmp_path / "base")
    save_file(
        {k: v for k, v in load_file(folder / "model.safetensors").items() if "pooler" not in k},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    model = models.load_model(str(folder), "classify")
    applied = shaken(ready(model, "lora", models.head_modules(model, "classify"), rank=2))
    assert not any("pooler" in name for name in applied.adapted.layers)
    result = export(applied.adapted, tmp_path / "out", source=models.resolve(str(folder)))
    assert difference(applied.model, result.reload()) < TOLERANCE


def test_an_update_of_full_rank_states_what_truncation_loses(tmp_path):
    applied = shaken(ready(models.load_model("stories260k", "causal-lm"), "randlora", rank=8), scale=0.3)
    whole = {name: layer.delta() for name, layer in applied.adapted.layers.items()}
    result = export(applied.adapted, tmp_path / "out", source=STORIES, rank=4)
    assert result.errors.keys() == whole.keys()
    for name, delta in whole.items():
        singular = torch.linalg.svdvals(delta.double())
        want = (singular[4:].square().sum() / singular.square().sum()).sqrt().item()
        assert result.errors[name] == pytest.approx(want, rel=1e-2), name
        assert want > 0.1
    assert difference(applied.model, result.reload()) > TOLERANCE
    full = export(applied.adapted, tmp_path / "full", source=STORIES, rank=64)
    assert all(error < 1e-2 for error in full.errors.values())


@pytest.mark.parametrize("target", ["vllm", "llamacpp"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("lora", {"rank": 4}),
        ("lamda++", {"rank": 6, "rank_choices": (4, 6, 8)}),
        ("lora-xs", {"rank": 6}),
        ("loram", {"rank": 3}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_for_programs_that_know_one_rank_and_one_alpha(name, options, target, tmp_path):
    from safetensors.torch import load_file

    applied = shaken(ready(models.load_model("stories260k", "causal-lm"), name, **options))
    result = export(applied.adapted, tmp_path / "out", source=STORIES, target=target)
    assert result.errors == {}
    assert difference(applied.model, result.reload()) < TOLERANCE
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    assert config["lora_alpha"] == config["r"]
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {value.shape[0] if ".lora_A." in key else value.shape[1] for key, value in tensors.items()} == {config["r"]}
    assert all(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in tensors)
    page = (tmp_path / "out" / "README.md").read_text()
    assert ("- `vllm serve " if target == "vllm" else "- `llama-cli --model BASE.gguf --lora out/adapter.gguf`") in page
    assert (tmp_path / "out" / "adapter.gguf").exists() == (target == "llamacpp")
    assert "from peft import PeftModel" in page


def test_a_method_of_pefts_own_for_vllm(tmp_path):
    applied = shaken(ready(models.load_model("stories260k", "causal-lm"), "randlora", rank=8), scale=0.3)
    result = export(applied.adapted, tmp_path / "out", source=STORIES, target="vllm", max_error=0.05)
    assert max(result.errors.values()) <= 0.05
    assert len(set(result.ranks.values())) == 1
    assert result.suggested_rank >= max(result.ranks.values())
    assert difference(applied.model, result.reload()) > 1e-4
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"


@pytest.mark.parametrize("target", ["vllm", "llamacpp"])
def test_a_classifier_with_a_new_head_is_refused(target, pooled_folder, tmp_path):
    applied = ready(models.load_model(str(pooled_folder), "classify"), "lora", ("classifier",), rank=2)
    with pytest.raises(ValueError, match=r"cannot load this adapter; merge it instead\. modules that are trained .*classifier"):
        export(applied.adapted, tmp_path / "out", target=target)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["lora", "lamda", "svfit", "monarch", "full", "galore"])
def test_a_merged_language_model(name, tmp_path):
    applied = shaken(ready(models.load_model("stories260k", "causal-lm"), name))
    want = logits(applied.model)
    result = export(
        applied.adapted or applied.model, tmp_path / "out", "merged", tokenizer=models.load_tokenizer("stories260k")
    )
    # of the largest logit, about 12: float32 rounds a merged weight and a sum of products differently
    assert ((logits(result.reload()) - want).abs().max() / want.abs().max()).item() < 2e-6
    assert result.errors == {}
    again = models.load_model(str(tmp_path / "out"), "causal-lm")
    assert ((logits(again) - want).abs().max() / want.abs().max()).item() < 2e-6
    assert models.load_tokenizer(str(tmp_path / "out"))("Once upon")["input_ids"]


@pytest.mark.parametrize("name", ["lora", "monarch", "full", "linear-probe"])
def test_a_merged_pooled_classifier(name, pooled_folder, tmp_path):
    model = models.load_model(str(pooled_folder), "classify")
    applied = shaken(ready(model, name, ("classifier",)))
    want = logits(applied.model)
    source, tokenizer = models.resolve(str(pooled_folder)), models.load_tokenizer(str(pooled_folder))
    result = export(applied.adapted or applied.model, tmp_path / "out", "merged", tokenizer=tokenizer, source=source)
    assert (logits(result.reload()) - want).abs().max().item() < TOLERANCE
    again = models.load_model(str(tmp_path / "out"), "classify")
    assert hasattr(again, "encoder"), "the folder is still one of sentence-transformers"


def test_a_merged_transformers_classifier(bert_folder, tmp_path):
    model = models.load_model(str(bert_folder), "classify", num_labels=3)
    applied = shaken(ready(model, "lora", ("classifier",)))
    want = logits(applied.model)
    result = export(applied.adapted, tmp_path / "out", "merged", tokenizer=models.load_tokenizer(str(bert_folder)))
    assert (logits(result.reload()) - want).abs().max().item() < TOLERANCE


def test_bfloat16_stays_bfloat16(tmp_path):
    applied = shaken(ready(models.load_model("stories260k", "causal-lm", dtype=torch.bfloat16), "lora"))
    result = export(applied.adapted, tmp_path / "peft", source=STORIES)
    loaded = result.reload()
    assert next(loaded.parameters()).dtype == torch.bfloat16
    assert difference(applied.model, loaded) < 0.1
    want = logits(applied.model)
    merged = export(applied.adapted, tmp_path / "merged", "merged").reload()
    assert next(merged.parameters()).dtype == torch.bfloat16
    assert (logits(merged) - want).abs().max().item() < 0.25


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["peft", "merged"])
@pytest.mark.parametrize("pooled", [False, True])
def test_the_readme_runs(kind, pooled, pooled_folder, tmp_path):
    """As a user would: the block of the folder's README, in a program that does not know lowdim."""
    if pooled:
        applied = shaken(ready(models.load_model(str(pooled_folder), "classify"), "lora", ("classifier",)))
        name, ask = str(pooled_folder), "the film was good"
    else:
        applied, name = shaken(ready(models.load_model("stories260k", "causal-lm"), "lora")), "stories260k"
        ask = None
    tokenizer = models.load_tokenizer(name)
    if pooled:
        batch = tokenizer([ask], return_tensors="pt")
        want = applied.model.eval()(batch["input_ids"], batch["attention_mask"]).logits
    else:
        want = logits(applied.model)
    export(applied.adapted, tmp_path / "out", kind, tokenizer=tokenizer, source=models.resolve(name))
    code = (tmp_path / "out" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    if pooled:
        code = code.replace("a text", ask) + "print(logits.flatten().tolist())\n"
    else:
        ids = "torch.tensor([[2, 5, 6, 7, 19, 3], [2, 8, 22, 3, 0, 0]])"
        code += f"import torch\nids = {ids}\nprint(model.eval()(ids, (ids != 0).long()).logits.flatten().tolist())\n"
    code += "import sys\nassert 'lowdim' not in sys.modules\n"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False, env=os.environ
    )
    assert done.returncode == 0, done.stderr
    got = torch.tensor(json.loads(done.stdout.strip().splitlines()[-1]))
    assert torch.allclose(got, want.flatten(), atol=TOLERANCE)


@pytest.mark.slow
def test_sentence_transformers_loads_a_merged_encoder(pooled_folder, tmp_path):
    library = pytest.importorskip("sentence_transformers")
    applied = shaken(ready(models.load_model(str(pooled_folder), "classify"), "lora", ("classifier",)))
    tokenizer = models.load_tokenizer(str(pooled_folder))
    batch = tokenizer(["the film was good"], return_tensors="pt")
    with torch.no_grad():
        want = applied.model.eval().encoder(**batch).last_hidden_state.mean(1)
    source = models.resolve(str(pooled_folder))
    export(applied.adapted, tmp_path / "out", "merged", tokenizer=tokenizer, source=source)
    got = library.SentenceTransformer(str(tmp_path / "out"), device="cpu").encode(["the film was good"])
    assert torch.allclose(torch.tensor(got), want, atol=TOLERANCE)


def test_what_cannot_be_exported(tmp_path):
    applied = ready(models.load_model("stories260k", "causal-lm"), "lora")
    with pytest.raises(UnknownNameError, match=r"--format must be one of peft, merged; got 'pefd' \(nearest: peft"):
        export(applied.adapted, tmp_path / "out", "pefd")
    with pytest.raises(ValueError, match="only an adapted model can be written as a PEFT adapter; export it as 'merged'"):
        export(applied.model, tmp_path / "out", "peft")
    with pytest.raises(ValueError, match="only transformers models can be written merged; got Sequential"):
        export(torch.nn.Sequential(torch.nn.Linear(2, 2)), tmp_path / "out", "merged")
    for options in ({"rank": 2}, {"max_error": 0.1}, {"target": "vllm"}):
        with pytest.raises(ValueError, match="is for --format peft"):
            export(applied.adapted, tmp_path / "out", "merged", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["peft", "merged"])
def test_a_full_disk_leaves_nothing(kind, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    applied = ready(tiny.llama(), "lora", rank=2)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"could not write .*out.* \(No space left on device\); nothing was changed"):
        export(applied.adapted, tmp_path / "out", kind)
    assert list(tmp_path.iterdir()) == []


def test_other_files_of_the_folder_stay(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    (tmp_path / "out" / "README.md").write_text("old")
    applied = ready(tiny.llama(), "lora", rank=2)
    export(applied.adapted, tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").read_text() == "precious"
    assert (tmp_path / "out" / "README.md").read_text().startswith("# A PEFT adapter")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_exporting_says_nothing(tmp_path, capfd):
    export(ready(tiny.llama(), "lora", rank=2).adapted, tmp_path / "out", "merged")
    assert capfd.readouterr() == ("", "")

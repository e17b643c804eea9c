"""`lowdim export`."""

import pytest

import lowdim
from lowdim import models


def damage(folder, kind):
    file = folder / "adapter.safetensors"
    raw = file.read_bytes()
    if kind == "truncated":
        file.write_bytes(raw[: len(raw) // 2])
    elif kind == "flipped":
        file.write_bytes(raw[:-3] + bytes([raw[-3] ^ 1]) + raw[-2:])
    elif kind == "foreign":
        from safetensors.torch import load_file, save_file

        save_file(load_file(file), file)
    elif kind == "missing":
        file.unlink()
    elif kind == "peft":
        file.unlink()
        (folder / "adapter_config.json").write_text("{}")


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        ("truncated", "adapter.safetensors is damaged or not a safetensors file"),
        ("flipped", "is damaged: its tensors and description do not match its digest"),
        ("foreign", "was not written by lowdim"),
        ("missing", "adapter.safetensors does not exist"),
        ("peft", "adapter_config.json: peft_type: Field required"),
    ],
)
def test_export_refuses_a_damaged_adapter(kind, part, refused, finished, tmp_path):
    import shutil

    folder = shutil.copytree(finished / "adapter", tmp_path / "adapter")
    damage(folder, kind)
    assert part in refused("export", folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_export_refuses_another_base_model(refused, finished, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_pretrained(models.assets() / "stories260k")
    with models.quiet():
        LlamaForCausalLM(config).save_pretrained(tmp_path / "other")
    models.load_tokenizer("stories260k").save_pretrained(tmp_path / "other")
    message = refused("export", finished / "adapter", tmp_path / "out", "--model", tmp_path / "other")
    assert "was trained on another base model: the weight of layer model.layers.0.self_attn.q_proj differs" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("what", ["run", "adapter"])
@pytest.mark.parametrize("format", ["peft", "merged"])
def test_export_of_a_run_and_of_an_adapter(what, format, call, finished, tmp_path):
    source = finished if what == "run" else finished / "adapter"
    code, out, err = call("export", source, tmp_path / "out", "--format", format)
    assert (code, err) == (0, "")
    assert ("exact" in out) == (format == "peft")
    assert (tmp_path / "out" / ("adapter_config.json" if format == "peft" else "config.json")).is_file()


def test_export_of_a_classifier_finds_its_classes(call, refused, bert_folder, pooled_folder, tmp_path):
    from lowdim.adapters import LoRA

    for folder, labels in ((bert_folder, 3), (pooled_folder, 5)):
        adapted = lowdim.adapt(
            models.load_model(str(folder), "classify", num_labels=labels), LoRA(rank=2), modules_to_save=["classifier"]
        )
        place = tmp_path / folder.name
        adapted.save(place / "adapter")
        code, _, err = call("export", place, place / "out", "--format", "merged")  # a folder that holds `adapter`
        assert (code, err) == (0, "")
        again = models.load_model(str(place / "out"), "classify", num_labels=labels)
        assert models.head_modules(again, "classify") == ("classifier",)
        assert "a model for causal-lm" in refused("export", place, place / "lm", "--task", "causal-lm")


def test_export_refuses(refused, finished, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.txt").write_text("precious")
    assert "is not empty; name another folder" in refused("export", finished, tmp_path / "mine")
    assert "is a file; name a folder" in refused("export", finished, tmp_path / "mine" / "a.txt")
    assert "--format must be one of peft, merged" in refused("export", finished, tmp_path / "out", "--format", "pft")
    assert "is not a folder" in refused("export", tmp_path / "nowhere", tmp_path / "out")
    assert "rank must be an int >= 1; got 0" in refused("export", finished, tmp_path / "out", "--rank", "0")
    assert "adapter.safetensors does not exist" in refused("export", tmp_path / "mine", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "mine" / "a.txt").read_text() == "precious"


@pytest.fixture(scope="module")
def full_rank(tmp_path_factory):
    """A saved adapter whose update is not low-rank."""
    import torch

    from lowdim.adapters import RandLoRA

    adapted = lowdim.adapt(models.load_model("stories260k", "causal-lm"), RandLoRA(rank=8, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for i, parameter in enumerate(adapted.trainable().values()):
            parameter.normal_(generator=torch.Generator().manual_seed(i))
    return adapted.save(tmp_path_factory.mktemp("full-rank") / "adapter")


def test_export_says_what_truncating_costs_and_which_rank_would_do(call, refused, full_rank, tmp_path):
    code, out, err = call("export", full_rank, tmp_path / "four", "--rank", "4")
    assert (code, err) == (0, "")
    lines = [line.split() for line in out.splitlines() if line.startswith("model.layers.")]
    assert len(lines) == 10
    assert {rank for _, rank, *_ in lines} == {"4"}
    assert {whole for _, _, whole, _ in lines} == {"32", "64"}
    assert all(0.1 < float(error) < 1 for *_, error in lines)
    assert "--format merged loses nothing" in out
    (wanted,) = (line.split()[1] for line in out.splitlines() if line.startswith("--rank "))
    out = call("export", full_rank, tmp_path / "wanted", "--rank", wanted)[1]
    assert "--rank" not in out
    assert max(float(line.split()[3]) for line in out.splitlines() if line.startswith("model.layers.")) <= 0.01

    out = call("export", full_rank, tmp_path / "bound", "--max-error", "0.2", "--for", "vllm")[1]
    lines = [line.split() for line in out.splitlines() if line.startswith("model.layers.")]
    assert len({rank for _, rank, *_ in lines}) == 1
    assert all(float(error) <= 0.2 for *_, error in lines)
    assert "vllm serve" in out
    assert "--max-lora-rank 32 " in out
    assert "--lora-modules NAME=bound" in out

    assert "exact" in call("export", full_rank, tmp_path / "own")[1]
    assert "not both" in refused("export", full_rank, tmp_path / "out", "--rank", "4", "--max-error", "0.1")
    assert "max_error must be" in refused("export", full_rank, tmp_path / "out", "--max-error", "1.5")
    assert "--for must be one of vllm, llamacpp; got 'ollama'" in refused(
        "export", full_rank, tmp_path / "out", "--for", "ollama"
    )
    message = refused("export", full_rank, tmp_path / "out", "--for", "vllm", "--format", "merged")
    assert "is for --format peft" in message
    assert not (tmp_path / "out").exists()


def test_export_for_llama_cpp(call, finished, tmp_path):
    code, out, err = call("export", finished, tmp_path / "out", "--for", "llamacpp")
    assert (code, err) == (0, "")
    assert out.startswith("exact\n")
    assert "llama-cli --model BASE.gguf --lora out/adapter.gguf" in out
    assert (tmp_path / "out" / "adapter.gguf").read_bytes()[:4] == b"GGUF"


def test_export_of_a_run_from_random_weights(call, refused, recipe, tmp_path):
    assert call("run", recipe(pretrained=False))[0] == 0
    assert "started from random weights" in refused("export", tmp_path / "out", tmp_path / "peft")
    assert call("export", tmp_path / "out", tmp_path / "merged", "--format", "merged")[0] == 0


@pytest.fixture(scope="module")
def pefts(tmp_path_factory):
    """A folder that PEFT wrote for a language model, and one for a classifier."""
    peft = pytest.importorskip("peft")
    place = tmp_path_factory.mktemp("peft")
    config = {"r": 2, "init_lora_weights": False, "target_modules": ["q_proj"]}
    for name, task in (("lm", "CAUSAL_LM"), ("classes", "SEQ_CLS")):
        kind = "causal-lm" if name == "lm" else "classify"
        model = models.load_model("stories260k", kind, num_labels=3, pad_token_id=0)
        peft.get_peft_model(model, peft.LoraConfig(**config, task_type=task)).save_pretrained(place / name)
    return place


@pytest.mark.parametrize("name", ["lm", "classes"])
@pytest.mark.parametrize("options", [["--format", "merged"], ["--rank", "1"], ["--format", "peft"]], ids="-".join)
def test_export_of_what_peft_wrote(name, options, call, pefts, tmp_path):
    code, out, err = call("export", pefts / name, tmp_path / "out", *options)
    assert (code, err) == (0, "")
    assert f"written {tmp_path / 'out'}" in " ".join(out.split())
    wanted = "config.json" if "merged" in options else "adapter_config.json"
    assert (tmp_path / "out" / wanted).is_file()


def test_a_cut_is_shown_and_recorded_by_layer(call, refused, pefts, tmp_path):
    import json

    code, out, err = call("export", pefts / "lm", tmp_path / "cut", "--rank", "1")
    assert (code, err) == (0, "")
    shown = [line.split() for line in out.splitlines() if line.startswith("model.layers.")]
    assert len(shown) == 5
    assert {(rank, whole) for _, rank, whole, _ in shown} == {("1", "2")}
    assert f"ranks and errors by layer: {tmp_path / 'cut' / 'ranks.json'}" in " ".join(out.split())
    record = json.loads((tmp_path / "cut" / "ranks.json").read_text())
    assert record["rank"] == 1
    assert [(row["layer"], f"{row['error']:.4f}") for row in record["layers"]] == [(name, error) for name, *_, error in shown]
    assert all(row["error"] > 0.01 for row in record["layers"])
    assert "rank=3 is above what is there: the update has rank 2" in refused(
        "export", pefts / "lm", tmp_path / "more", "--rank", "3"
    )
    assert call("export", pefts / "lm", tmp_path / "same", "--rank", "2")[1].startswith("exact\n")
    assert not (tmp_path / "more").exists()


def test_what_peft_wrote_is_diagnosed(call, pefts):
    code, out, err = call("diagnose", "intruders", "--base", "stories260k", "--tuned", pefts / "lm", "--k", "2")
    assert (code, err) == (0, "")
    assert "q_proj" in out


def _edited(**changes):
    import json

    def edit(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


def _of_another_base(folder):
    """As for a model that is half as wide."""
    from safetensors.torch import load_file, save_file

    path = folder / "adapter_model.safetensors"
    halves = {k: v[:, ::2].contiguous() if "lora_A" in k else v[::2].contiguous() for k, v in load_file(path).items()}
    save_file(halves, path)


def _pickled(folder):
    import torch

    (folder / "adapter_model.safetensors").unlink()
    torch.save({}, folder / "adapter_model.bin")


BAD = {
    "another base": (_of_another_base, "the model's layer has shape (64, 64); it was trained on"),
    "DoRA": (_edited(use_dora=True), "use_dora=True means DoRA, which scales the rows of the weight"),
    "another type": (_edited(peft_type="VERA"), "holds PEFT's 'VERA'; lowdim reads its LORA: merge it with PEFT"),
    "a type that changes inputs": (_edited(peft_type="PREFIX_TUNING"), "holds PEFT's 'PREFIX_TUNING'"),
    "an unknown type": (_edited(peft_type="NEXTRA"), "holds PEFT's 'NEXTRA'"),
    "no configuration": (lambda folder: (folder / "adapter_config.json").unlink(), "adapter_config.json does not exist"),
    "no tensors": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "adapter_model.safetensors does not exist"),
    "damaged tensors": (
        lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"rubbish" * 9),
        "adapter_model.safetensors is damaged or not a safetensors file",
    ),
    "a damaged configuration": (lambda folder: (folder / "adapter_config.json").write_text("{"), "adapter_config.json"),
    "a pickle": (_pickled, "adapter_model.bin is a pickle"),
    "no base": (_edited(base_model_name_or_path=None), "does not say which model it is for; name it with --model"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_folders_of_pefts(what, refused, pefts, tmp_path):
    import shutil

    change, message = BAD[what]
    change(shutil.copytree(pefts / "lm", tmp_path / "adapter"))
    for options in ([], ["--format", "merged"]):
        assert message in refused("export", tmp_path / "adapter", tmp_path / "out", *options)
    told = refused("diagnose", "intruders", "--base", "stories260k", "--tuned", tmp_path / "adapter", "--k", "2")
    assert message in told
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_export_of_another_kind_of_model(call, tmp_path):
    import torch
    from transformers import ViTForImageClassification

    import zoo

    with models.quiet():
        zoo.MODELS["vit-classifier"].build().save_pretrained(tmp_path / "base")
        model = ViTForImageClassification.from_pretrained(tmp_path / "base")
    adapted = lowdim.adapt(model, lowdim.adapters.LoRA(rank=2), modules_to_save=["classifier"])
    with torch.no_grad():
        for parameter in adapted.trainable().values():
            parameter.add_(0.1)
    adapted.save(tmp_path / "adapter")
    code, _, err = call("export", tmp_path / "adapter", tmp_path / "out", "--format", "merged")
    assert (code, err) == (0, "")
    with models.quiet():
        again = ViTForImageClassification.from_pretrained(tmp_path / "out").eval()
    batch = zoo.MODELS["vit-classifier"].batch()
    assert torch.allclose(zoo.logits_of(again, batch), zoo.logits_of(model.eval(), batch), atol=1e-5)


def test_export_into_a_dense_model_has_no_zeros_to_keep(refused, finished, tmp_path):
    message = refused("export", finished, tmp_path / "out", "--format", "merged", "--keep-mask")
    assert "is for a sparse base model: no adapted layer here has 1% exact zeros" in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("scheme", ["int8", "int4", "nf4"])
def test_zeros_of_rounding_to_few_bits_are_no_mask(scheme, tmp_path):
    import torch

    pytest.importorskip("bitsandbytes" if scheme == "nf4" else "torchao")
    adapted = lowdim.adapt(models.load_model("stories260k", "causal-lm", quantize=scheme), lowdim.adapters.LoRA(rank=2))
    before = {name: parameter.clone() for name, parameter in adapted.model.named_parameters()}
    with pytest.raises(ValueError, match=r"keep_mask \(--keep-mask\) is for a sparse base model"):
        lowdim.export.export(adapted, tmp_path / "out", "merged", keep_mask=True)
    assert not (tmp_path / "out").exists()
    assert all(torch.equal(parameter, before[name]) for name, parameter in adapted.model.named_parameters())


def test_export_into_a_sparse_model_keeps_its_zeros(call, refused, tmp_path):
    import torch
    from transformers import LlamaForCausalLM

    import tiny
    from lowdim.compress import NMDecayConfig, finalize, nm_decay

    model = finalize(nm_decay(tiny.llama(), NMDecayConfig(total_steps=1)))
    with models.quiet():
        model.save_pretrained(tmp_path / "base")
        tiny.save_tokenizer(tmp_path / "base", [*tiny.SPECIAL, *tiny.PLAIN])
        model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    adapted = lowdim.adapt(model, lowdim.adapters.LoRA(rank=2))
    with torch.no_grad():
        for parameter in adapted.trainable().values():
            parameter.add_(0.1)
    adapted.save(tmp_path / "adapter")
    common = ("export", tmp_path / "adapter", tmp_path / "out", "--keep-mask")
    assert "--keep-mask is for --format merged, which writes weights; got --format peft" in refused(*common)
    assert call(*common, "--format", "merged")[::2] == (0, "")
    with models.quiet():
        again = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    for name, layer in adapted.layers.items():
        weight, before = again.get_submodule(name).weight, layer.pristine_weight()
        assert torch.equal(weight == 0, before == 0)
        assert bool(((weight.view(-1, 4) != 0).sum(1) == 2).all())
        torch.testing.assert_close(weight[before != 0], layer.effective_weight()[before != 0])

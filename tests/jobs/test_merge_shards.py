"""Merging a model's files tensor by tensor: the bits of a merge in memory, the base's dtype and files, one weight in memory."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lowdim
import tiny
from lowdim import models
from lowdim.adapters import LoRA
from lowdim.catalogue import variant
from lowdim.errors import CheckpointError
from lowdim.jobs import ExportSettings, export
from lowdim.jobs.adapted import load_adapted
from lowdim.jobs.merge_shards import merge_shards
from lowdim.methods import apply
from lowdim.models.shards import Shards
from methods import ADAPTERS, row, small

BENCH = Path(__file__).parents[2] / "bench"
#: Adapters whose layers do not stand alone.
WHOLE = {"SAID", "ATLAS", "DiffoRA"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A random Llama in bfloat16, in three files."""
    folder = tmp_path_factory.mktemp("base") / "llama"
    torch.manual_seed(0)
    model = tiny.llama(2, tie_word_embeddings=False).to(torch.bfloat16)
    with models.quiet():
        model.save_pretrained(folder, max_shard_size="20KB")
        models.load_tokenizer("stories260k").save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 2
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "LICENSE").write_text("mine")
    (folder / "pytorch_model.bin").write_bytes(b"left out")
    (folder / "README.md").write_text("of the base model")
    return folder


def shake(adapted):
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in adapted.trainable().values():
            p.add_(0.1 * torch.randn(p.shape, generator=generator).to(p))
    return adapted


def lora(base, folder, **options):
    """A saved LoRA of the model in `base`."""
    model = models.load_model(str(base), "causal-lm")
    given = {"rank": 3, "alpha": 6.0, **options}
    shake(lowdim.adapt(model, LoRA(**given))).save(folder)
    return folder


def tensors(folder):
    found = {}
    for file in folder.glob("*.safetensors"):
        found.update(load_file(file))
    return found


def in_memory(adapter, dtype):
    """The whole model merged in float32, then rounded."""
    _, adapted = load_adapted(adapter)
    return {name: value.to(dtype) for name, value in adapted.merge().state_dict().items()}


def same(got, want):
    assert got.keys() == want.keys()
    return all(torch.equal(value, want[name]) and value.dtype == want[name].dtype for name, value in got.items())


@pytest.mark.parametrize("name", sorted(ADAPTERS))
def test_every_adapter_gives_the_bits_of_a_merge_in_memory(name, base, tmp_path):
    key = ADAPTERS[name]
    if name == "LoRAM":
        pytest.skip("it is trained on a smaller copy of the model, which no folder holds")
    model = models.load_model(str(base), "causal-lm")
    ids = torch.arange(3, 27).view(3, 8)
    batch = {"input_ids": ids, "labels": ids}
    options = {"target_modules": ["q_proj", "down_proj"]} if name == "DiffoRA" else {}
    chosen = small(key, **options) if key in ADAPTERS.values() else variant(key)
    applied = apply(chosen, model, lr=1e-2, steps=10, batches=[batch], loss_fn=lambda m, b: m(**b).loss)
    shake(applied.adapted).save(tmp_path / "adapter")
    found = merge_shards(tmp_path / "adapter", tmp_path / "out", models.resolve(str(base)))
    if name in WHOLE:
        assert found is None
        assert not (tmp_path / "out").exists()
        return
    assert found is not None, row(key)
    got = tensors(tmp_path / "out")
    assert same(got, in_memory(tmp_path / "adapter", torch.bfloat16))
    changed = [key for key, value in tensors(base).items() if not torch.equal(value, got[key])]
    assert set(changed) == {f"{layer}.weight" for layer in applied.adapted.layers}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_one_file_keeps_its_dtype(dtype, tmp_path):
    torch.manual_seed(0)
    with models.quiet():
        tiny.llama(1).to(dtype).save_pretrained(tmp_path / "base")
        models.load_tokenizer("stories260k").save_pretrained(tmp_path / "base")
    lora(tmp_path / "base", tmp_path / "adapter")
    assert merge_shards(tmp_path / "adapter", tmp_path / "out", models.resolve(str(tmp_path / "base")))
    want = in_memory(tmp_path / "adapter", dtype)
    assert same(tensors(tmp_path / "out"), {key: want[key] for key in tensors(tmp_path / "base")})


def test_a_sparse_base_that_is_filled_in_is_reported(tmp_path):
    torch.manual_seed(0)
    model = tiny.llama(1)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.mul_(torch.arange(32) % 2)  # every other column is 0
    with models.quiet():
        model.save_pretrained(tmp_path / "base")
        models.load_tokenizer("stories260k").save_pretrained(tmp_path / "base")
    lora(tmp_path / "base", tmp_path / "adapter", target_modules=["q_proj", "v_proj"])
    what = r"layer model\.layers\.0\.self_attn\.q_proj had 50\.0% exact zeros and has 0\.0%; .*--keep-mask"
    with pytest.warns(UserWarning, match=what) as caught:
        assert merge_shards(tmp_path / "adapter", tmp_path / "out", models.resolve(str(tmp_path / "base")))
    assert not any("v_proj" in str(each.message) for each in caught)


def test_what_peft_wrote(base, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2, lora_alpha=5, init_lora_weights=False, rank_pattern={"v_proj": 4}, use_rslora=True, task_type="CAUSAL_LM",
        target_modules=["q_proj", "v_proj", "down_proj"],
    )  # fmt: skip
    model = models.load_model(str(base), "causal-lm")
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    assert merge_shards(tmp_path / "adapter", tmp_path / "out", models.resolve(str(base)))
    assert same(tensors(tmp_path / "out"), in_memory(tmp_path / "adapter", torch.bfloat16))


def test_modules_that_were_saved_whole_are_in_their_places(base, tmp_path):
    model = models.load_model(str(base), "causal-lm")
    adapted = lowdim.adapt(model, LoRA(rank=1, target_modules=["q_proj"]), modules_to_save=["embed_tokens", "norm"])
    shake(adapted).save(tmp_path / "adapter")
    assert merge_shards(tmp_path / "adapter", tmp_path / "out", models.resolve(str(base)))
    got = tensors(tmp_path / "out")
    assert same(got, in_memory(tmp_path / "adapter", torch.bfloat16))
    assert torch.equal(got["model.norm.weight"], model.model.norm.weight.to(torch.bfloat16))


def test_the_files_of_the_base_go_along(base, tmp_path):
    lora(base, tmp_path / "adapter")
    result = export(ExportSettings(adapter=tmp_path / "adapter", out=tmp_path / "out", format="merged"))
    out = tmp_path / "out"
    for file in base.iterdir():
        if file.name in ("README.md", "pytorch_model.bin"):
            continue
        assert (out / file.name).is_file(), file.name
        if file.suffix != ".safetensors":
            assert (out / file.name).read_bytes() == file.read_bytes(), file.name
        else:
            with safe_open(file, "pt") as old, safe_open(out / file.name, "pt") as new:
                assert (old.keys(), old.metadata()) == (new.keys(), new.metadata())
    assert not (out / "pytorch_model.bin").exists()
    assert "dtype='bfloat16'" in (out / "README.md").read_text()
    loaded = result.reload()
    assert next(loaded.parameters()).dtype == torch.bfloat16
    want = in_memory(tmp_path / "adapter", torch.bfloat16)
    assert all(torch.equal(value, want[name]) for name, value in loaded.state_dict().items())


def test_an_adapters_own_tokenizer_comes_first(base, tmp_path):
    lora(base, tmp_path / "adapter")
    models.load_tokenizer("stories260k").save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "chat_template.jinja").write_text("of the adapter")
    merge_shards(tmp_path / "adapter", tmp_path / "out", models.resolve(str(base)))
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "of the adapter"
    assert not (tmp_path / "out" / "adapter.json").exists()


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_a_weight_that_others_share_is_merged_in_memory(target, tmp_path):
    torch.manual_seed(0)
    with models.quiet():
        tiny.llama(1, tie_word_embeddings=True).save_pretrained(tmp_path / "base")
        models.load_tokenizer("stories260k").save_pretrained(tmp_path / "base")
    lora(tmp_path / "base", tmp_path / "adapter", target_modules=[target])
    assert merge_shards(tmp_path / "adapter", tmp_path / "out", models.resolve(str(tmp_path / "base"))) is None
    export(ExportSettings(adapter=tmp_path / "adapter", out=tmp_path / "out", format="merged"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


def test_another_base_is_refused_and_nothing_is_left(base, tmp_path):
    lora(base, tmp_path / "adapter")
    torch.manual_seed(1)
    with models.quiet():
        tiny.llama(2, tie_word_embeddings=False).to(torch.bfloat16).save_pretrained(tmp_path / "other", max_shard_size="20KB")
    with pytest.raises(CheckpointError, match=r"was trained on another base model: the weight of layer model\.layers\.\d"):
        merge_shards(tmp_path / "adapter", tmp_path / "out", models.resolve(str(tmp_path / "other")))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "other"]


def test_a_weight_that_its_dtype_cannot_hold_is_refused(tmp_path):
    torch.manual_seed(0)
    with models.quiet():
        tiny.llama(1).half().save_pretrained(tmp_path / "base")
    model = models.load_by_class(str(tmp_path / "base"), "LlamaForCausalLM")
    adapted = lowdim.adapt(model, LoRA(rank=1, target_modules=["o_proj"]))
    with torch.no_grad():
        for layer in adapted.layers.values():
            layer.update.A.fill_(300.0)
            layer.update.B.fill_(300.0)
    adapted.save(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"layer model\.layers\.0\.self_attn\.o_proj: the merged weight has entries up to"):
        merge_shards(tmp_path / "adapter", tmp_path / "out", models.resolve(str(tmp_path / "base")))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


@pytest.mark.parametrize("features", [(1024, 2049), (40000, 35), (3, 5), (64, 1)])
@pytest.mark.parametrize("alpha", [6.0, 5.0])
def test_blocks_of_rows_have_the_bits_of_the_whole_sum(features, alpha):
    torch.manual_seed(0)
    adapted = shake(lowdim.adapt(torch.nn.Sequential(torch.nn.Linear(*features)), LoRA(rank=3, alpha=alpha)))
    weight, update = adapted.model[0].base.weight.detach(), adapted.model[0].update
    blocks = [(rows, block.clone()) for rows, block in update.exact_rows(weight)]
    assert len(blocks) > 1 or weight.numel() < 2**17
    assert [rows.start for rows, _ in blocks] == [0, *(rows.stop for rows, _ in blocks[:-1])]
    assert torch.equal(torch.cat([block for _, block in blocks]), weight + update.exact())


def test_a_weight_that_was_not_finite_before_stays_so(tmp_path):
    torch.manual_seed(0)
    model = tiny.llama(1).half()
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[3, 5] = torch.inf
    with models.quiet():
        model.save_pretrained(tmp_path / "base")
        models.load_tokenizer("stories260k").save_pretrained(tmp_path / "base")
    peft = pytest.importorskip("peft")  # lowdim itself attaches to no such weight
    config = peft.LoraConfig(r=2, init_lora_weights=False, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
    peft.get_peft_model(models.load_by_class(str(tmp_path / "base"), "LlamaForCausalLM"), config).save_pretrained(
        tmp_path / "a"
    )
    assert merge_shards(tmp_path / "a", tmp_path / "out", models.resolve(str(tmp_path / "base")))
    got, before = tensors(tmp_path / "out"), tensors(tmp_path / "base")
    name = "model.layers.0.self_attn.q_proj.weight"
    factors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    A, B = (factors[f"base_model.model.{name.removesuffix('weight')}lora_{side}.weight"].float() for side in "AB")
    want = before[name].float() + 4.0 * (B @ A)  # alpha 8 over rank 2
    assert torch.equal(got[name], want.half())
    assert got[name].isinf().nonzero().tolist() == [[3, 5]]


@pytest.mark.parametrize("kind", ["missing", "short", "lacking", "outside"])
def test_a_damaged_base_is_named(kind, base, tmp_path):
    import shutil

    lora(base, tmp_path / "adapter")
    copy = shutil.copytree(base, tmp_path / "copy")
    file = sorted(copy.glob("*.safetensors"))[-1]
    index = json.loads((copy / "model.safetensors.index.json").read_text())
    if kind == "missing":
        file.unlink()
    elif kind == "short":
        file.write_bytes(file.read_bytes()[:-4])
    elif kind == "lacking":
        held = load_file(file)
        held.pop(next(iter(held)))
        save_file(held, file, {"format": "pt"})
    else:
        index["weight_map"] = dict.fromkeys(index["weight_map"], "../base/model.safetensors")
        (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    words = {"missing": "is missing", "short": "is damaged", "lacking": "lacks the tensor", "outside": "index.json is damaged"}
    with pytest.raises(CheckpointError, match=words[kind]):
        merge_shards(tmp_path / "adapter", tmp_path / "out", models.resolve(str(copy)))
    assert not (tmp_path / "out").exists()


def test_an_interruption_leaves_nothing(base, tmp_path, monkeypatch):
    from lowdim.adapters.core import merging

    lora(base, tmp_path / "adapter")
    calls = []

    def stop(*args):
        calls.append(args)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(*args)

    real = merging.merged_weight
    monkeypatch.setattr(merging, "merged_weight", stop)
    with pytest.raises(KeyboardInterrupt):
        merge_shards(tmp_path / "adapter", tmp_path / "out", models.resolve(str(base)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


@pytest.mark.slow
def test_a_model_of_a_gigabyte_needs_the_memory_of_one_file(tmp_path):
    """In a process of its own, whose peak is compared with what it had before the merge."""
    spec = importlib.util.spec_from_file_location("bench_merge", BENCH / "merge.py")
    merge = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(merge)
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    written = (
        f"import sys\nsys.path.insert(0, {str(BENCH)!r})\nimport merge\nfrom pathlib import Path\n"
        f"base, adapter = Path({str(base)!r}), Path({str(adapter)!r})\n"
        "merge.write_base(base, 1e9, '300MB')\nmerge.write_adapter(adapter, base, 8)"
    )
    subprocess.run([sys.executable, "-c", written], check=True)
    files = [file.stat().st_size for file in base.glob("*.safetensors")]
    assert sum(files) > 9e8
    found = merge.measured(merge.MERGE, base, adapter, tmp_path / "out")
    assert found["megabytes"] < max(files) / 1e6 + 200
    assert {file.name: file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors")} == {
        file.name: file.stat().st_size for file in base.glob("*.safetensors")
    }
    name = "model.layers.1.mlp.up_proj"
    factors = load_file(adapter / "adapter_model.safetensors")
    A, B = (factors[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
    old, new = (Shards.of(folder).read(f"{name}.weight") for folder in (base, tmp_path / "out"))
    assert torch.allclose(new.float() - old.float(), 2.0 * B @ A, atol=4e-4)
    assert not torch.equal(old, new)

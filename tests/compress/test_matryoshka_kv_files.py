"""Models with projections as checkpoints: ranks come back, and without lowdim the folder is the dense model."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import kv_models
from lowdim.compress import LoRDConfig, MatryoshkaCache, MatryoshkaKVConfig, lord, matryoshka_kv, set_kv_ranks
from lowdim.errors import CheckpointError, LowdimError
from lowdim.pretrained import save_compressed, stored_bytes

transformers = pytest.importorskip("transformers")
from transformers import AutoModel, AutoModelForCausalLM  # noqa: E402

KEYS, VALUES = [[2, 5], [8, 3]], [[4, 5], [1, 3]]


def projected(name="llama", dtype=torch.float32):
    model = kv_models.build(name, dtype=dtype)
    model.config.dtype = dtype
    return matryoshka_kv(model, MatryoshkaKVConfig(), kv_models.batches())


def ranks(model):
    return [m.lowdim_kv.ranks for m in model.modules() if hasattr(m, "lowdim_kv")]


def logits(model, cached=True):
    with torch.no_grad():
        cache = MatryoshkaCache(model) if cached else None
        return model.eval()(kv_models.ids(), past_key_values=cache, use_cache=cached).logits


def generated(model, cache=None):
    return model.generate(kv_models.ids(), past_key_values=cache, max_new_tokens=8, do_sample=False)


def load(folder, kind=AutoModelForCausalLM, **options):
    model, info = kind.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values()), info
    return model


@pytest.fixture
def saved(tmp_path):
    model = projected()
    set_kv_ranks(model, KEYS, VALUES)
    save_compressed(model, tmp_path / "small")
    return model, tmp_path / "small"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gemma3", "smollm2"])
def test_equal_to_the_bit(name, dtype, tmp_path):
    model = kv_models.build(name)
    model.save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=dtype)
    matryoshka_kv(model, MatryoshkaKVConfig(key_ranks=3, value_ranks=5), kv_models.batches())
    assert save_compressed(model, tmp_path / "small") == stored_bytes(model)
    again = load(tmp_path / "small", dtype="auto")
    assert ranks(again) == ranks(model)
    assert ranks(again)
    for cached in (True, False):
        assert torch.equal(logits(again, cached), logits(model, cached))
    assert torch.equal(generated(again, MatryoshkaCache(again)), generated(model, MatryoshkaCache(model)))
    files = [path.stat().st_size for path in (tmp_path / "small").glob("*.safetensors")]
    header = 8192  # of names and checksums; the tensors of so small a model weigh little more
    assert stored_bytes(model) <= sum(files) <= 1.02 * stored_bytes(model) + header


def test_ranks_stand_in_the_configuration(saved):
    config = json.loads((saved[1] / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "lowdim"
    assert config["system"] == "MatryoshkaKV"
    for i, (keys, values) in enumerate(zip(KEYS, VALUES)):
        about = config["layers"][f"model.layers.{i}.self_attn.lowdim_kv"]
        assert about == {"class": "MatryoshkaProjection", "heads": 2, "head_dim": 8, "key_ranks": keys, "value_ranks": values}


def test_the_body_alone_and_back(saved, tmp_path):
    model, folder = saved
    body = load_body(folder)
    assert ranks(body) == ranks(model)
    with torch.no_grad():
        want = model.model(kv_models.ids()).last_hidden_state
        assert torch.equal(body(kv_models.ids()).last_hidden_state, want)
        save_compressed(body, tmp_path / "body")
        whole, info = AutoModelForCausalLM.from_pretrained(tmp_path / "body", output_loading_info=True)
        assert set(info["missing_keys"]) == {"lm_head.weight"}
        assert torch.equal(whole.eval().model(kv_models.ids()).last_hidden_state, want)


def load_body(folder):
    return AutoModel.from_pretrained(folder).eval()


def test_saved_again_after_a_change(saved, tmp_path):
    again = load(saved[1])
    set_kv_ranks(again, 6, 7)
    again.save_pretrained(tmp_path / "again")
    third = load(tmp_path / "again")
    assert ranks(third) == [((6, 6), (7, 7))] * 2
    assert torch.equal(logits(third), logits(again))


def test_in_shards(saved, tmp_path):
    save_compressed(saved[0], tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert torch.equal(logits(load(tmp_path / "shards")), logits(saved[0]))


@pytest.mark.slow
def test_without_lowdim_it_is_the_dense_model(saved, tmp_path):
    code = (
        "import sys, torch\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(saved[1])!r}).eval()\n"
        "assert 'lowdim' not in sys.modules\n"
        "from safetensors.torch import save_file\n"
        f"ids = torch.tensor({kv_models.ids().tolist()})\n"
        f"save_file({{'y': model(ids).logits.detach().clone()}}, {str(tmp_path / 'y.safetensors')!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-800:]
    torch.testing.assert_close(load_file(tmp_path / "y.safetensors")["y"], logits(kv_models.build(), False))


def test_dequantize_takes_the_projections_away(saved):
    dense = kv_models.build()
    again = load(saved[1])
    assert again.config._attn_implementation == "lowdim_matryoshka"
    again.dequantize()
    assert not ranks(again)
    assert again.config._attn_implementation == dense.config._attn_implementation
    assert torch.equal(logits(again, False), logits(dense, False))
    assert again.state_dict().keys() == dense.state_dict().keys()
    assert torch.equal(generated(again), generated(dense))


def test_beside_low_rank_layers(tmp_path):
    model = kv_models.build()
    lord(
        model,
        LoRDConfig(rank_ratio=0.5, target_modules=["up_proj", "down_proj"], skip_unprofitable=False),
        kv_models.batches() * 4,
    )
    matryoshka_kv(model, MatryoshkaKVConfig(key_ranks=4), kv_models.batches())
    save_compressed(model, tmp_path)
    again = load(tmp_path)
    assert torch.equal(logits(again), logits(model))
    again.dequantize()
    assert not any("lowdim" in name or name.endswith(".A") for name in again.state_dict())


def test_there_is_no_dense_form(saved, tmp_path):
    with pytest.raises(LowdimError, match=r"layers\.0\.self_attn\.lowdim_kv.*leaves every weight as it is"):
        save_compressed(saved[0], tmp_path / "dense", dense=True)
    assert not (tmp_path / "dense").exists()


def test_a_missing_factor_or_a_changed_rank_is_noticed(saved):
    path = saved[1] / "model.safetensors"
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        header = file.metadata()
    tensors = load_file(path)
    gone = {name: value for name, value in tensors.items() if not name.endswith("layers.1.self_attn.lowdim_kv.key_raw")}
    save_file(gone, path, header)
    with pytest.raises(CheckpointError, match=r"lacks model\.layers\.1\.self_attn\.lowdim_kv\.key_raw"):
        load(saved[1])
    other = copy.deepcopy(tensors)
    other["model.layers.0.self_attn.lowdim_kv.key_ranks"][0] += 1
    save_file(other, path, header)
    with pytest.raises(CheckpointError, match="key_ranks differs from what was written"):
        load(saved[1])
    save_file(tensors, path, header)
    config = json.loads((saved[1] / "config.json").read_text())
    config["quantization_config"]["layers"]["model.layers.0.self_attn.lowdim_kv"]["key_ranks"] = [2, 9]
    (saved[1] / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"key_ranks must be one int in \[1, 8\]"):
        load(saved[1])


@pytest.mark.slow
def test_trainer_accepts_it(saved, tmp_path):
    again = load(saved[1])
    rows = [{"input_ids": row, "labels": row} for row in kv_models.ids(8, 12)]
    options = transformers.TrainingArguments(
        str(tmp_path / "out"), max_steps=2, per_device_train_batch_size=4, report_to=[], use_cpu=True, save_strategy="no"
    )
    before = again.model.layers[0].self_attn.lowdim_kv.key_raw.detach().clone()
    transformers.Trainer(again, options, train_dataset=rows).train()
    assert not torch.equal(again.model.layers[0].self_attn.lowdim_kv.key_raw.detach(), before)

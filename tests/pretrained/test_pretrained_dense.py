"""Compressed models as plain ones again, which need no lowdim."""

import json

import pytest
import torch
from compressed_models import FACTORED, MODELS, by_lord, by_wina, compressed, load, logits
from safetensors.torch import load_file

import tiny
from lowdim.compress import last_report
from lowdim.errors import LowdimError
from lowdim.pretrained import save_compressed, stored_bytes

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore:few calibration tokens")


@pytest.mark.parametrize("method", FACTORED)
@pytest.mark.parametrize("name", MODELS)
def test_dequantize_gives_a_plain_model_that_saves_and_loads(name, method, tmp_path):
    kind = transformers.AutoModelForSequenceClassification if name == "bert" else transformers.AutoModelForCausalLM
    model = compressed(MODELS[name], method)
    save_compressed(model, tmp_path / "small")
    plain = load(tmp_path / "small", kind).dequantize()
    assert {n: type(m) for n, m in plain.named_modules()} == {n: type(m) for n, m in MODELS[name]().named_modules()}
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-4, atol=1e-5)
    plain.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert torch.equal(logits(load(tmp_path / "plain", kind)), logits(plain))


@pytest.mark.parametrize("method", FACTORED)
@pytest.mark.parametrize("name", MODELS)
def test_dense_checkpoints_need_no_lowdim(name, method, tmp_path, forget_lowdim):
    kind = transformers.AutoModelForSequenceClassification if name == "bert" else transformers.AutoModelForCausalLM
    model = compressed(MODELS[name], method)
    want, classes = logits(model), [type(m) for m in model.modules()]
    size = save_compressed(model, tmp_path / "dense", dense=True)
    assert [type(m) for m in model.modules()] == classes  # it stays compressed
    assert size > stored_bytes(model)
    factors = load_file(tmp_path / "dense" / "factors.safetensors")
    own = ("basis", "codebook", "codes") if method == "lr2vq" else "AB"
    assert factors.keys() == {f"{row.name}.{factor}" for row in last_report(model).replaced for factor in own}
    forget_lowdim()
    torch.testing.assert_close(logits(load(tmp_path / "dense", kind)), want, rtol=1e-4, atol=1e-5)


def test_sparse_inputs_gone_the_model_is_the_one_before(tmp_path):
    model = tiny.llama().eval()
    want = logits(model)
    save_compressed(by_wina(model), tmp_path / "small")
    assert torch.equal(logits(load(tmp_path / "small").dequantize()), want)
    save_compressed(model, tmp_path / "dense", dense=True)
    assert torch.equal(logits(load(tmp_path / "dense")), want)


def test_a_dense_checkpoint_that_would_lose_a_bias_is_refused(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1, "vocab_size": 48}
    config = transformers.Qwen2Config(num_key_value_heads=2, **sizes)  # has no switch for the bias of o_proj
    with pytest.raises(LowdimError, match=r"cannot hold .*bias.*centered=False"):
        save_compressed(by_lord(transformers.Qwen2ForCausalLM(config)), tmp_path / "dense", dense=True)
    assert not (tmp_path / "dense").exists()
    save_compressed(by_lord(transformers.Qwen2ForCausalLM(config), centered=False), tmp_path / "dense", dense=True)
    save_compressed(by_lord(transformers.Qwen2ForCausalLM(config)), tmp_path / "small")

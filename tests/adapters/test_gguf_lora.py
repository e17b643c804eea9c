"""A LoRA as GGUF, read back with gguf-py: names, rows, factors and metadata, as llama.cpp reads them."""

import sys

import pytest
import torch

import lowdim
import tiny
from lowdim.adapters import LaMDA, LoRA
from lowdim.adapters.core.files.gguf_lora import ARCHITECTURES, FILE, Names, gguf_problems
from lowdim.errors import MissingExtraError
from lowdim.surgery import find_layers

gguf = pytest.importorskip("gguf")
from gguf_bases import neighbours  # noqa: E402 - after the check for gguf

HEADS, GROUPS, WIDTH = 4, 2, 32  # attention heads, key and value heads, hidden size


def trained(model, method):
    adapted = lowdim.adapt(model, method)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in adapted.trainable().values():
            p.copy_(torch.randn(p.shape, generator=generator))
    return adapted


def llama(**sizes):
    given = {"tie_word_embeddings": False, "num_attention_heads": HEADS, "num_key_value_heads": GROUPS, "hidden_size": WIDTH}
    return tiny.llama(2, **{**given, **sizes})


def read(folder):
    """Metadata and tensors by name, with rows first."""
    reader = gguf.GGUFReader(folder / FILE)
    about = {name: field.contents() for name, field in reader.fields.items()}
    return about, {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}


def product(about, tensors, name):
    """`ΔW` as llama.cpp applies it: `alpha / rank · b a`."""
    a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
    return about["adapter.lora.alpha"] / b.shape[1] * (b @ a)


BLOCK = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@pytest.mark.parametrize("method", [LoRA(rank=3, alpha=12.0), LaMDA(rank=6)], ids=["lora", "lamda"])
def test_a_llama(method, tmp_path):
    adapted = trained(llama(), method)
    assert adapted.export(tmp_path, target="llamacpp").exact
    about, tensors = read(tmp_path)
    assert about["general.architecture"] == "llama"
    assert (about["general.type"], about["adapter.type"]) == ("adapter", "lora")
    assert len(tensors) == 2 * 2 * len(BLOCK)
    assert all(value.dtype == torch.float32 for value in tensors.values())
    heads = {"attn_q": HEADS, "attn_k": GROUPS}
    for block in range(2):
        for theirs, ours in BLOCK.items():
            delta = adapted.layers[f"model.layers.{block}.{theirs}"].delta()
            want = neighbours(delta, heads[ours]) if ours in heads else delta
            got = product(about, tensors, f"blk.{block}.{ours}.weight")
            assert torch.allclose(got, want, rtol=1e-5, atol=1e-4), (block, ours)
            if ours in heads:
                assert not torch.allclose(got, delta, atol=0.1), "their order is another one"


def test_the_token_embedding_is_stored_transposed_and_the_head_as_it_is(tmp_path):
    adapted = trained(llama(), LoRA(rank=2, target_modules=["embed_tokens", "lm_head"]))
    adapted.export(tmp_path, target="llamacpp")
    about, tensors = read(tmp_path)
    assert about["adapter.lora.alpha"] == 2.0
    a, b = tensors["token_embd.weight.lora_a"], tensors["token_embd.weight.lora_b"]
    assert (a.shape, b.shape) == ((48, 2), (WIDTH, 2))
    assert torch.allclose(a @ b.T, adapted.layers["model.embed_tokens"].delta().T, rtol=1e-5, atol=1e-5)
    head = product(about, tensors, "output.weight")
    assert torch.allclose(head, adapted.layers["lm_head"].delta(), rtol=1e-5, atol=1e-5)


def test_an_architecture_that_rotates_halves_keeps_its_rows(tmp_path):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "num_key_value_heads": GROUPS, "num_hidden_layers": 1}
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=40, intermediate_size=24, **sizes))
    adapted = trained(model, LoRA(rank=2, target_modules=["q_proj", "k_proj"]))
    adapted.export(tmp_path, target="llamacpp")
    about, tensors = read(tmp_path)
    assert about["general.architecture"] == "qwen2"
    for theirs, ours in (("q_proj", "attn_q"), ("k_proj", "attn_k")):
        delta = adapted.layers[f"model.layers.0.self_attn.{theirs}"].delta()
        assert torch.allclose(product(about, tensors, f"blk.0.{ours}.weight"), delta, rtol=1e-5, atol=1e-5)


def test_16_bit_factors_are_written_in_float32(tmp_path):
    adapted = trained(llama().bfloat16(), LoRA(rank=2, target_modules=["v_proj"]))
    adapted.export(tmp_path, target="llamacpp")
    about, tensors = read(tmp_path)
    want = adapted.layers["model.layers.1.self_attn.v_proj"].delta()
    assert torch.allclose(product(about, tensors, "blk.1.attn_v.weight"), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_linear_layer_of_a_known_architecture_has_a_name_of_its_own(kind):
    import transformers
    from accelerate import init_empty_weights

    cls = getattr(transformers, kind)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64, "pad_token_id": 0}
    config = cls.config_class(**sizes, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    with init_empty_weights():
        model = cls(config)
    layers = list(find_layers(model))
    assert len(layers) >= 2 * 4
    assert gguf_problems(model, layers) == []
    names = [Names(model).of(name) for name in layers]
    assert len(set(names)) == len(names)
    assert {name.split(".")[0] for name in names} == {"blk"}


def test_what_has_no_name_in_gguf_is_refused_by_name(tmp_path):
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 40}
    other = trained(GPTNeoXForCausalLM(GPTNeoXConfig(**sizes)), LoRA(rank=1))
    with pytest.raises(ValueError, match=r"^llama\.cpp cannot load .* the names that a GPTNeoXForCausalLM has in GGUF are not"):
        other.export(tmp_path / "out", target="llamacpp")
    model = llama()
    model.model.layers[0].extra = torch.nn.Linear(4, 4)
    added = trained(model, LoRA(rank=1, target_modules=["extra", "q_proj"]))
    with pytest.raises(ValueError, match=r"layers without a name in GGUF: model\.layers\.0\.extra$"):
        added.export(tmp_path / "out", target="llamacpp")
    assert not (tmp_path / "out").exists()


def test_without_gguf_the_extra_is_named(tmp_path, monkeypatch):
    adapted = trained(llama(), LoRA(rank=1, target_modules=["q_proj"]))
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingExtraError, match=r"an adapter for llama\.cpp needs the package 'gguf': .*lowdim\[gguf\]"):
        adapted.export(tmp_path / "out", target="llamacpp")
    assert not (tmp_path / "out").exists()
    assert adapted.export(tmp_path / "out").exact, "PEFT's files need no extra"

"""LoRA in llama.cpp's own engine: next-token probabilities agree with transformers'. Run by `make test-llamacpp` alone.

The engine is compiled when it is installed, for five to ten minutes, so neither `make test` nor CI has it. What was measured is
kept in `results/llamacpp.json`.
"""

import importlib.metadata
import json
import os
import platform
from pathlib import Path

import pytest
import torch

import lowdim
from lowdim import models
from lowdim.adapters import LoRA
from lowdim.adapters.core.files.gguf_lora import ARCHITECTURES

pytestmark = pytest.mark.llamacpp
TOLERANCE = 1e-2  # of a probability, as the manual states it
SEEN: dict[str, dict[str, float]] = {}
RANDOM = [
    "GemmaForCausalLM",
    "GraniteForCausalLM",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Olmo2ForCausalLM",
    "Phi3ForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
]


@pytest.fixture(scope="module", autouse=True)
def record():
    """Writes what was measured to the file that LOWDIM_RECORD names."""
    yield
    path = os.environ.get("LOWDIM_RECORD")
    if path and SEEN:
        names = ("llama_cpp_python", "gguf", "transformers", "torch")
        about = {
            "command": "make test-llamacpp",
            "what": "largest difference of a next-token probability between llama.cpp and transformers, over all positions",
            "models": SEEN,
            "environment": {
                "lowdim": lowdim.__version__,
                "python": platform.python_version(),
                **{name: importlib.metadata.version(name) for name in names},
                "machine": platform.machine(),
            },
        }
        Path(path).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


@pytest.fixture(autouse=True)
def _engine():
    pytest.importorskip("llama_cpp", reason="pip install 'lowdim[llamacpp]'")


def in_engine(base, ids, lora=None):
    """Next-token probabilities `(tokens, words)` of llama.cpp."""
    import llama_cpp

    given = {} if lora is None else {"lora_path": str(lora)}
    engine = llama_cpp.Llama(str(base), n_ctx=64, logits_all=True, n_threads=1, n_threads_batch=1, verbose=False, **given)
    engine.eval(ids)
    logits = torch.from_numpy(engine.scores[: len(ids)].copy())
    engine.close()
    return logits.double().softmax(-1)


@torch.no_grad()
def in_transformers(model, ids):
    return model.eval()(input_ids=torch.tensor([ids])).logits[0].double().softmax(-1)


def adapted_to(model, scale):
    """A LoRA of every linear layer whose update moves the output."""
    adapted = lowdim.adapt(model, LoRA(rank=4, alpha=8.0))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in adapted.layers.values():
            layer.update.B.copy_(scale * torch.randn(layer.update.B.shape, generator=generator))
    return adapted


def compare(name, base, model, ids, folder, *, scale=0.02, bound=TOLERANCE):
    """Base and adapted model, in both programs; the differences are kept for the record."""
    plain = in_transformers(model, ids)
    found = {"base": float((in_engine(base, ids) - plain).abs().max())}
    adapted = adapted_to(model, scale)
    adapted.export(folder, target="llamacpp")
    want = in_transformers(model, ids)
    found["adapted"] = float((in_engine(base, ids, folder / "adapter.gguf") - want).abs().max())
    found["moved_by_the_adapter"] = float((want - plain).abs().max())
    SEEN[name] = {"bound": bound} | {key: float(f"{value:.3g}") for key, value in found.items()}
    assert found["moved_by_the_adapter"] > 10 * TOLERANCE, "an adapter that is not applied must be seen"
    assert found["base"] < bound
    assert found["adapted"] < bound


def test_stories260k(tmp_path):
    import gguf_bases

    model, tokenizer = models.load_model("stories260k", "causal-lm"), models.load_tokenizer("stories260k")
    words = [tokenizer.convert_ids_to_tokens(i) for i in range(model.config.vocab_size)]
    base = gguf_bases.write_base(tmp_path / "base.gguf", model, "llama", turned=True, tokens=words)
    ids = tokenizer("Once upon a time, there was a little girl named Lily. She loved to play")["input_ids"]
    compare("stories260k", base, model, ids, tmp_path / "out")


@pytest.mark.parametrize("quantized", [False, True], ids=["float32", "as-packaged"])
def test_smollm2(quantized, tmp_path):
    import gguf_bases

    source = models.resolve("smollm2-135m")
    packaged = Path(source.path) / source.gguf
    base = packaged if quantized else gguf_bases.dequantized(packaged, tmp_path / "base.gguf")
    model = models.load_model("smollm2-135m", "causal-lm")
    ids = models.load_tokenizer("smollm2-135m")("The capital of France is Paris, and the capital of Italy is")["input_ids"]
    # llama.cpp multiplies 4-bit weights with activations that it rounds to 8 bits; transformers does not round
    name, bound = ("SmolLM2-135M Q4_1", 0.1) if quantized else ("SmolLM2-135M float32", TOLERANCE)
    compare(name, base, model, ids, tmp_path / "out", scale=0.05, bound=bound)


@pytest.mark.parametrize("kind", RANDOM)
def test_a_random_model_of_another_architecture(kind, tmp_path):
    import transformers

    import gguf_bases

    cls, about = getattr(transformers, kind), ARCHITECTURES[kind]
    config = cls.config_class(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=64,
        pad_token_id=0,
        initializer_range=0.2,
        tie_word_embeddings=kind == "GemmaForCausalLM",
    )
    model = cls(config)
    base = gguf_bases.write_base(tmp_path / "base.gguf", model, about.name, turned=about.turned)
    ids = torch.randint(3, 64, (24,), generator=torch.Generator().manual_seed(1)).tolist()
    compare(f"random {kind.removesuffix('ForCausalLM')}", base, model, ids, tmp_path / "out", scale=0.1)

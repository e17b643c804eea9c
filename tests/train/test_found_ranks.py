"""What a training found: its ranks are recorded, and what is written is smaller by them and gives the scores of the record."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lowdim import models
from lowdim.layers import MaestroLinear, maestro_decompose
from lowdim.layers.maestro.model import maestro_compact
from lowdim.modules import InterpolativeLinear, LowRankLinear
from lowdim.pretrained import save_compressed
from lowdim.train.recipes import Recipe
from lowdim.train.run import run_recipe

SHAPES = [(64, 32), (32, 64), (48, 48)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_product_by_its_own_columns(shape, bias, dtype):
    out_features, in_features = shape
    for rank in (1, 5, min(shape) - 1, min(shape)):
        generator = torch.Generator().manual_seed(rank)
        U = torch.randn(out_features, rank, generator=generator, dtype=dtype)
        V = torch.randn(rank, in_features, generator=generator, dtype=dtype)
        b = torch.randn(out_features, generator=generator, dtype=dtype) if bias else None
        layer = InterpolativeLinear.from_product(U, V, b)
        want, x = U @ V, torch.randn(3, in_features, generator=generator, dtype=dtype)
        bound = 1e-5 if dtype == torch.float32 else 1e-12
        assert float((layer.dense_weight() - want).detach().norm() / want.norm()) < bound
        assert torch.allclose(layer(x), nn.functional.linear(x, want, b), rtol=bound, atol=100 * bound)
        held = sum(t.numel() for name, t in layer.state_dict().items() if name != "bias")
        assert held == rank * (out_features + in_features - rank) + rank


def test_bad_sizes():
    with pytest.raises(ValueError, match=r"rank must be .*; got 5"):
        InterpolativeLinear(4, 8, rank=5)
    with pytest.raises(ValueError, match="x must have 8 features"):
        InterpolativeLinear(8, 4, rank=2)(torch.zeros(2, 4))


@pytest.mark.parametrize(
    ("rank", "kind", "held"),
    [
        (32, nn.Linear, 64 * 32),
        (31, InterpolativeLinear, 31 * (64 + 32 - 31) + 31),
        (20, InterpolativeLinear, 20 * 76 + 20),
        (1, LowRankLinear, 96),
        (0, LowRankLinear, 96),
    ],
)
def test_the_smallest_exact_form_of_a_layer(rank, kind, held):
    model = nn.Sequential(MaestroLinear(32, 64, seed=0), nn.ReLU())
    x = torch.randn(5, 32)
    model[0].rank = rank
    want = model(x)
    small = maestro_compact(model)
    assert type(model[0]) is kind
    assert list(small) == ([] if kind is nn.Linear else ["0"])
    assert sum(t.numel() for name, t in model[0].state_dict().items() if name != "bias") == held
    assert torch.allclose(model(x), want, atol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_shrunk_model_loads_with_the_same_logits(architecture, tmp_path):
    """GPT-2 stores its weights transposed."""
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    from lowdim.layers import swap_linear

    torch.manual_seed(0)
    if architecture == "llama":
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=40, **sizes))
    else:
        model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40))
    swap_linear(model, MaestroLinear)
    for index, layer in enumerate(m for m in model.modules() if isinstance(m, MaestroLinear)):
        layer.rank = (16, 13, 2)[index % 3]
    x = torch.arange(12).reshape(2, 6)
    want = model.eval()(x).logits
    assert maestro_compact(model)
    got = model(x).logits
    assert torch.allclose(got, want, atol=1e-5)
    save_compressed(model, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(x).logits, got)
    assert torch.allclose(loaded.dequantize()(x).logits, got, atol=1e-5)


def _recipe(out, **changes):
    keys = {
        "model": "stories260k", "task": "causal-lm", "method": "maestro", "data": ["lowdim:shakespeare"], "max_length": 32,
        "limit": 32, "steps": 4, "batch_size": 4, "lr": 0.01,
        "options": {"lasso": 0.01, "threshold": 0.3, "shrink_interval": 2}, "out": str(out),
    }  # fmt: skip
    return Recipe(**{**keys, **changes})


def test_a_run_writes_what_it_found(tmp_path):
    from transformers import AutoModelForCausalLM

    said = []
    record = run_recipe(_recipe(tmp_path / "out"), say=said.append)
    full = {"q_proj": 64, "gate_proj": 64}
    ranks = json.loads((tmp_path / "out" / "run.json").read_text())["ranks"]
    assert ranks == record["ranks"]
    assert any(rank < full.get(name.rpartition(".")[2], 32) for name, rank in ranks.items())
    tensors = load_file(tmp_path / "out" / "model" / "model.safetensors")
    assert sum(t.numel() for t in tensors.values()) < 260_032
    assert any("compressed form" in line for line in said)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    held = {
        name: layer.rank for name, layer in loaded.named_modules() if isinstance(layer, InterpolativeLinear | LowRankLinear)
    }
    assert held
    assert all(ranks[name] == rank for name, rank in held.items() if ranks[name])
    # The score of the record is that of the folder.
    from lowdim.train.metrics import metric_for
    from lowdim.train.tasks import language_modelling

    task = language_modelling(models.load_tokenizer("stories260k"), ["lowdim:shakespeare"], max_length=32, limit=32, seed=0)
    assert task.evaluate(loaded, task.validation, metric_for("causal-lm")) == pytest.approx(record["validation"], rel=1e-6)


def test_nothing_found_is_written_dense(tmp_path):
    record = run_recipe(_recipe(tmp_path / "out", steps=2, options={"lasso": 0.0, "threshold": 0.0, "shrink_interval": 1}))
    assert min(record["ranks"].values()) >= 32
    config = json.loads((tmp_path / "out" / "model" / "config.json").read_text())
    assert "quantization_config" not in config


def test_convolutions_become_dense():
    model = maestro_decompose(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 4)))
    x = torch.randn(2, 3, 3, 3)
    want = model(x)
    assert maestro_compact(model) == {}
    assert type(model[0]) is nn.Conv2d
    assert torch.allclose(model(x), want, atol=1e-5)


@pytest.mark.parametrize("closed", [3, 8], ids=["some gates", "every gate"])
def test_closed_ranks_are_cut_from_an_adapter(closed, tmp_path):
    import lowdim
    import tiny
    from lowdim.adapters import SoRA

    def base():
        torch.manual_seed(0)
        return tiny.llama()

    adapted = lowdim.adapt(base(), SoRA(rank=8, alpha=12), seed=1)
    with torch.no_grad():
        for layer in adapted.layers.values():
            layer.update.B.normal_()
            layer.update.gate[:closed] = 0.0
    rows = torch.arange(8).reshape(1, 8)
    want, ranks = adapted.model.eval()(rows).logits, adapted.found_ranks()
    full = sum(t.numel() for t in adapted.state_dict().values())
    assert not adapted.compact()
    assert sum(t.numel() for t in adapted.state_dict().values()) < full * (max(1, 8 - closed) + 0.1) / 8
    assert adapted.found_ranks() == ranks
    assert torch.allclose(adapted.model(rows).logits, want, atol=1e-6)
    adapted.save(tmp_path / "adapter")
    loaded = lowdim.load_adapter(base(), tmp_path / "adapter")
    assert loaded.found_ranks() == ranks
    assert torch.equal(loaded.model.eval()(rows).logits, adapted.model(rows).logits)
    plain = loaded.merge()
    assert torch.allclose(plain(rows).logits, want, atol=1e-5)


def test_a_run_cuts_closed_ranks(tmp_path):
    options = {"rank": 8, "threshold": 0.2, "sparse_lambda": 1.0}
    record = run_recipe(_recipe(tmp_path / "out", method="sora", options=options))
    tensors = load_file(tmp_path / "out" / "adapter" / "adapter.safetensors")
    held = {name.rpartition(".update.gate")[0]: len(t) for name, t in tensors.items() if name.endswith(".update.gate")}
    assert min(record["ranks"].values()) < 8
    assert held == {name: max(1, rank) for name, rank in record["ranks"].items()}
    from lowdim.train.run import load_run

    adapted, _, _ = load_run(tmp_path / "out")
    assert adapted.found_ranks() == record["ranks"]


@pytest.mark.parametrize(("method", "options"), [("sora", {"rank": 8, "threshold": 0.2}), ("maestro", {"threshold": 3.0})])
def test_a_comparison_records_what_was_found(method, options, tmp_path):
    from lowdim.catalogue import variant
    from lowdim.comparison import runs
    from lowdim.methods import with_options
    from lowdim.train.metrics import metric_for
    from lowdim.train.tasks import language_modelling

    task = language_modelling(models.load_tokenizer("stories260k"), ["lowdim:shakespeare"], max_length=16, limit=16)
    bench = runs.Contest(
        model=models.load_model("stories260k", "causal-lm"), task=task, head=(), metric=metric_for("causal-lm"), steps=4,
        batch_size=4, folder=tmp_path, fingerprint="",
    )  # fmt: skip
    record = runs.perform(bench, runs.Run(with_options(variant(method), options), "seed", 0, 1e-2, 0, steps=4))
    assert record.failure is None
    assert record.ranks
    assert min(record.ranks.values()) < (8 if method == "sora" else 32)

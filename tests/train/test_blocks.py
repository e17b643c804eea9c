"""Models whose blocks have structured feed-forward layers, or token mixers: built, trained, written, loaded, forecast."""

import itertools
import re

import pytest
import torch

from lowdim import models
from lowdim.errors import LowdimError
from lowdim.jobs import PlanSettings, plan
from lowdim.layers import BlockDense, structured_mlp
from lowdim.models.architectures import llama_config
from lowdim.models.blocks import check_blocks, has_blocks, with_blocks
from lowdim.testing.agreement import refuses
from lowdim.train.recipes import load_recipe, new_recipe
from lowdim.train.run import run_recipe

transformers = pytest.importorskip("transformers")


def built(ffn=None, mixer=None, seed=0):
    config = llama_config("llama-tiny", vocab_size=40)
    config.num_hidden_layers, config.eos_token_id = 2, None
    torch.manual_seed(seed)
    return models.build(with_blocks(config, ffn, mixer), "pretrain").eval()


def ids(rows=2, length=14):
    return torch.randint(1, 40, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "text.txt"
    words = itertools.product("abcdefgh", "xyz", "uvw")
    file.write_text("\n\n".join(" ".join(f"{''.join(word)} is {i * j % 97}" for j in range(9)) for i, word in enumerate(words)))
    return str(file)


@pytest.mark.parametrize(
    ("ffn", "mixer"),
    [
        ("blockdense,rank=32", None),
        (None, "delta-product"),
        pytest.param("lowrank", "s4d", marks=pytest.mark.slow),
    ],
)
def test_a_run_trains_and_writes_what_loads_to_the_bit(ffn, mixer, text, tmp_path):
    recipe = new_recipe(model="llama-tiny", task="pretrain", ffn=ffn, mixer=mixer, data=[text], steps=4, max_length=24,
                        batch_size=4, lr=3e-3, out=str(tmp_path / "run"))  # fmt: skip
    record = run_recipe(recipe)
    assert record["losses"][-1] < record["losses"][0]
    assert record["samples"]
    assert record["recipe"]["ffn"] == ffn
    folder = tmp_path / "run" / "model"
    once, again = (transformers.AutoModelForCausalLM.from_pretrained(folder).eval() for _ in range(2))
    x = ids()
    with torch.no_grad():
        assert torch.equal(once(x).logits, again(x).logits)
        for layer in once.model.layers:
            assert type(layer.mlp).__name__ == ("LlamaMLP" if ffn is None else "StructuredMLP")
            assert type(layer.self_attn).__name__ == ("LlamaAttention" if mixer is None else "MixerBlock")
    if ffn == "blockdense,rank=32":
        assert once.model.layers[0].mlp.fc1.rank == 32


def test_a_saved_model_is_the_model(tmp_path):
    model = built("blockshuffle", "s4d")
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(ids()).logits, model(ids()).logits)
    assert has_blocks(again)
    assert not has_blocks(models.build(llama_config("llama-tiny", vocab_size=40), "pretrain"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("blockdense,rank=8,rank=16", "ffn gives rank twice"),
        ("blockdense,rank", "must be a name, with options as name=value"),
        ("fast", "ffn must be one of lowrank, blockdense, blockshuffle, dense; got 'fast'"),
        ("blockdense,width=3", "width"),
    ],
)
def test_words_that_are_no_choice(text, message):
    with pytest.raises((ValueError, TypeError), match=message):
        built(text, None)


def test_the_mapping_does_not_stay():
    """The architecture's own classes are built again, also after a refusal."""
    built("blockdense", "s4d")
    with pytest.raises(ValueError, match="ffn: layer fc1"):
        built("blockdense,nblocks=5,rank=10")
    plain = transformers.LlamaForCausalLM(llama_config("llama-tiny", vocab_size=40))
    assert type(plain.model.layers[0].mlp).__name__ == "LlamaMLP"
    assert type(plain.model.layers[0].self_attn).__name__ == "LlamaAttention"


def test_blocks_do_not_start_alike_and_a_seed_repeats_them():
    one, two, other = built("blockdense"), built("blockdense"), built("blockdense", seed=1)
    fc1 = [layer.mlp.fc1 for layer in one.model.layers]
    assert isinstance(fc1[0], BlockDense)
    assert not torch.equal(fc1[0].B, fc1[1].B)
    assert torch.equal(fc1[0].B, two.model.layers[0].mlp.fc1.B)
    assert not torch.equal(fc1[0].B, other.model.layers[0].mlp.fc1.B)
    assert fc1[0].rank == 64  # half of the width


@pytest.mark.parametrize("ffn", ["lowrank", "blockdense", "blockshuffle", "dense"])
def test_the_dense_equivalent_is_the_architectures_own(ffn, tmp_path):
    model = built(ffn)
    model.save_pretrained(tmp_path / "small")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    again.dequantize().save_pretrained(tmp_path / "dense")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    assert type(plain.model.layers[0].mlp).__name__ == "LlamaMLP"
    with torch.no_grad():
        torch.testing.assert_close(plain(ids()).logits, model(ids()).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mixer", ["delta-product", "s4d"])
@pytest.mark.parametrize("how", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_generation_with_the_state_is_that_without(mixer, how):
    """Rows padded on the left, which give what they give alone."""
    model, prompt = built(mixer=mixer), ids(2, 12)
    mask = torch.ones_like(prompt)
    mask[1, :4] = 0
    prompt = prompt * mask
    options = {
        "max_new_tokens": 6,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_scores": True,
        "pad_token_id": 0,
    }
    found = [model.generate(prompt, attention_mask=mask, use_cache=cached, **options, **how) for cached in (True, False)]
    assert torch.equal(found[0].sequences, found[1].sequences)
    torch.testing.assert_close(found[0].scores[-1], found[1].scores[-1], rtol=1e-4, atol=1e-4)
    alone = model.generate(prompt[1:, 4:], use_cache=True, **options, **how)
    assert torch.equal(alone.sequences[0], found[0].sequences[1, 4:])
    state = found[0].past_key_values.layers[0]
    assert state.keys.shape[-1] == 1, "beside its state the cache counts tokens, and holds no keys"


def test_the_past_changes_what_a_mixer_says():
    """And the future does not."""
    for mixer in ("delta-product", "s4d"):
        model, x = built(mixer=mixer), ids(1, 10)
        y = x.clone()
        y[0, 3] = x[0, 3] % 39 + 1
        with torch.no_grad():
            before, after = model(x).logits, model(y).logits
        torch.testing.assert_close(before[:, :3], after[:, :3], rtol=1e-5, atol=1e-6)
        assert float((before[:, -1] - after[:, -1]).abs().max()) > 1e-4


def test_a_forecast_knows_the_blocks():
    settings = {"model": "llama-tiny", "task": "pretrain", "methods": "full,block-dense", "length": 16, "tokenizer": "bytes"}
    dense, small, mixed = (plan(PlanSettings(**settings, **how)) for how in ({}, {"ffn": "blockdense"}, {"mixer": "s4d"}))
    assert [f.method for f in dense.forecasts] == ["full", "block-dense"]
    assert [f.method for f in small.forecasts] == ["full"], "another method's layers cannot take their place"
    config = with_blocks(models.load_config("llama-tiny"), "blockdense")
    config.vocab_size = 258
    count = sum(p.numel() for p in models.build(config, "pretrain").parameters())
    assert small.forecasts[0].trained_parameters == count < dense.forecasts[0].trained_parameters
    assert mixed.forecasts[0].trained_parameters != dense.forecasts[0].trained_parameters


def test_wrong_input_is_refused(text, tmp_path):
    usual = {"model": "llama-tiny", "task": "pretrain", "data": [text], "out": str(tmp_path / "run")}
    gpt2 = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2)
    mixtral = transformers.MixtralConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                                         num_key_value_heads=1, num_local_experts=2, vocab_size=20)  # fmt: skip
    refuses(
        [
            (ValueError, "blockdense", lambda: check_blocks("blokdense", None)),
            (ValueError, "delta-product", lambda: check_blocks(None, "delta")),
            (ValueError, "name=value", lambda: check_blocks("blockdense,64", None)),
            (ValueError, "blockdense", lambda: new_recipe(**usual, ffn="blokdense")),
            (ValueError, "pretrained: false", lambda: new_recipe(model="minilm", task="classify", ffn="blockdense")),
            (ValueError, "--model and --task", lambda: new_recipe(model="llama-tiny")),
            (ValueError, "method block-dense", lambda: run_recipe(new_recipe(**usual, ffn="blockdense", method="block-dense"))),
            (ValueError, "ffn: layer fc1 (128 -> 688)", lambda: built("blockdense,rank=999")),
            (TypeError, "ranks", lambda: built("blockdense,ranks=9")),
            (TypeError, "mixer: ", lambda: built(mixer="s4d,states=9")),
            (ValueError, "hidden_act; GPT2Config", lambda: with_blocks(gpt2, "blockdense")),
            (ValueError, "MixtralMLP", lambda: models.build(with_blocks(mixtral, "dense"), "pretrain")),
            (ValueError, "--ffn is for --task pretrain", lambda: PlanSettings(model="stories260k", ffn="blockdense")),
            (LowdimError, "no dense equivalent", lambda: dequantized(tmp_path)),
        ]
    )


def dequantized(folder):
    built(mixer="s4d").save_pretrained(folder / "mixer")
    transformers.AutoModelForCausalLM.from_pretrained(folder / "mixer").dequantize()


def test_a_recipe_says_it_too(text, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(f"model: llama-tiny\ntask: pretrain\ntokenizer: bytes\nmethod: full\nffn: blockdense\ndata: {text}\n")
    assert load_recipe(file).ffn == "blockdense"
    assert load_recipe(file, ffn="lowrank", mixer="s4d").mixer == "s4d"
    assert re.search("blockdense", structured_mlp.__doc__)

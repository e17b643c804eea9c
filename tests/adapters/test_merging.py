"""Merging touches adapted layers only, and a merge that fails leaves the model as it was."""

import copy

import pytest
import torch
from torch import nn

import lowdim
import tiny
from lowdim.adapters import SAID, AdaptedLayer, AdapterSet, LaMDA, LoRA
from lowdim.adapters.core import merging
from lowdim.testing.closeness import relative_error
from lowdim.testing.small_model import sample_input, small_model


def trained(adapted, scale=0.1):
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in adapted.trainable_here().values():
            parameter.add_((scale * torch.randn(parameter.shape, generator=generator)).to(parameter))
    return adapted


class Packed(nn.Module):
    """What keeps its weight in integers, as 4-bit layers do, between two that are adapted."""

    def __init__(self, dtype=torch.uint8):
        super().__init__()
        torch.manual_seed(0)
        self.q_proj, self.v_proj = nn.Linear(8, 8), nn.Linear(8, 8)
        self.packed = nn.Module()
        self.packed.weight = nn.Parameter(torch.arange(4).to(dtype), requires_grad=False)
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        return self.v_proj(self.norm(self.q_proj(x))) * self.packed.weight.float().sum()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.bool])
@pytest.mark.parametrize("method", [LoRA(rank=2, target_modules=["q_proj"]), LaMDA(rank=2, target_modules=["v_proj"])])
def test_parameters_that_are_integers_stay(dtype, method):
    model, x = Packed(dtype), torch.randn(3, 8)
    adapted = trained(lowdim.adapt(model, method))
    want = model(x)
    plain = adapted.merge()
    assert relative_error(plain(x), want) < 1e-5
    assert torch.equal(plain.packed.weight, Packed(dtype).packed.weight)
    assert not plain.packed.weight.requires_grad
    assert plain.q_proj.weight.requires_grad
    assert plain.norm.weight.requires_grad
    adapted.unmerge()
    assert not model.norm.weight.requires_grad
    assert torch.equal(model(x), want)


def test_a_whole_model_method_beside_integers():
    model, x = Packed(), torch.randn(3, 8)
    chosen = [name for name, p in model.named_parameters() if p.is_floating_point()]
    adapted = trained(lowdim.adapt(model, SAID(dimension=20, parameters=chosen)))
    want = model(x)
    assert relative_error(adapted.merge()(x), want) < 1e-5
    assert not model.packed.weight.requires_grad


def large(model, dtype, value):
    """An adapter whose update of `body.second` is `value` in every entry."""
    adapted = lowdim.adapt(model.to(dtype), LoRA(rank=1, alpha=1), dtype=torch.float32)
    with torch.no_grad():
        for name, layer in adapted.layers.items():
            layer.update.A.fill_(1.0)
            layer.update.B.fill_(value if name == "body.second" else 1.0)
    return adapted


@pytest.mark.parametrize(
    ("dtype", "value", "largest"),
    [(torch.float16, 1e5, "65504"), (torch.float16, -1e5, "65504"), (torch.bfloat16, 3.4e38, r"3\.38953e\+38")],
)
def test_what_the_dtype_cannot_hold_is_an_error_that_names_the_layer(dtype, value, largest):
    adapted = large(small_model(), dtype, value)
    before = dict(adapted.model.named_modules())
    for _ in range(2):  # it can be repeated
        with pytest.raises(
            ValueError, match=rf"layer body\.second: the merged weight has entries up to .* at most {largest}; "
        ):
            adapted.merge()
        assert dict(adapted.model.named_modules()) == before
        assert adapted.merge_report is None
        assert not adapted.model.score.weight.requires_grad
    with torch.no_grad():
        adapted.layers["body.second"].update.B.fill_(1.0)
    merged = adapted.merge()
    assert torch.isfinite(merged.body["second"].weight).all()
    assert set(name for name, _ in merged.named_modules()) == {"", "body", "body.first", "body.second", "score"}  # noqa: C401


def test_numbers_next_to_the_limit_are_held():
    adapted = large(small_model(), torch.float16, 65504.0)
    with torch.no_grad():
        adapted.layers["body.second"].base.weight.zero_()
    assert bool((adapted.merge().body["second"].weight == 65504).all())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_update_that_is_not_finite_is_an_error(value):
    adapted = large(small_model(), torch.float32, value)
    with pytest.raises(ValueError, match=r"layer body\.second: the update has 72 entries that are NaN or infinite"):
        adapted.merge()
    assert isinstance(adapted.model.body["second"], AdaptedLayer)


def test_a_weight_that_was_infinite_before_may_stay():
    model = small_model()
    with torch.no_grad():
        model.score.weight[0, 0] = -torch.inf
    merged = trained(lowdim.adapt(model, LoRA(rank=1, target_modules=["score"]))).merge()
    assert merged.score.weight[0, 0] == -torch.inf


def test_several_adapters_are_merged_all_or_none():
    adapters = AdapterSet.of(one=large(small_model(), torch.float16, 1e5))
    before = dict(adapters.model.named_modules())
    with pytest.raises(ValueError, match=r"layer body\.second: the merged weight"):
        adapters.merge()
    assert dict(adapters.model.named_modules()) == before
    adapters.activate(one=0.1)
    adapters.merge()
    assert type(adapters.model.body["second"]) is nn.Linear


@pytest.mark.parametrize("fail_at", [0, 1])
def test_an_interrupted_merge_puts_the_layers_back(fail_at, monkeypatch):
    adapted = trained(lowdim.adapt(small_model(), LoRA(rank=2)))
    before, want = dict(adapted.model.named_modules()), adapted.model(sample_input())
    calls, real = [], merging.replace_layers

    def interrupted(model, layers):
        calls.append(layers)
        if len(calls) > 1:  # the layers are put back
            return real(model, layers)
        real(model, dict(list(layers.items())[:fail_at]))
        raise KeyboardInterrupt

    monkeypatch.setattr(merging, "replace_layers", interrupted)
    with pytest.raises(KeyboardInterrupt):
        adapted.merge()
    assert dict(adapted.model.named_modules()) == before
    assert torch.equal(adapted.model(sample_input()), want)
    monkeypatch.setattr(merging, "replace_layers", real)
    assert relative_error(adapted.merge()(sample_input()), want) < 1e-5


@pytest.mark.parametrize("several", [False, True])
def test_words_that_were_tied_are_saved_apart(several, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = tiny.llama(tie_word_embeddings=True)
    adapted = trained(lowdim.adapt(model, LoRA(rank=1, target_modules=["embed_tokens"])))
    ids = torch.arange(8).view(1, 8)
    want = model(ids).logits
    merging_object = AdapterSet.of(one=adapted) if several else adapted
    merging_object.merge()
    assert model.config.tie_word_embeddings is False
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert relative_error(again(ids).logits, want) < 1e-5
    merging_object.unmerge()
    assert model.config.tie_word_embeddings is True


def test_four_bit_layers_everywhere_and_two_adapted():
    bnb = pytest.importorskip("bitsandbytes")
    model = tiny.llama(2)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and name != "lm_head":
            four = bnb.nn.Linear4bit(layer.in_features, layer.out_features, bias=False, compute_dtype=torch.float32)
            four.weight = bnb.nn.Params4bit(layer.weight.data.clone(), requires_grad=False, quant_type="nf4")
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, four.to("cpu"))
    adapted = trained(lowdim.adapt(model, LoRA(rank=2, target_modules=["q_proj", "v_proj"])))
    ids = torch.arange(8).view(1, 8)
    want = model(ids).logits
    plain = adapted.merge()
    assert relative_error(plain(ids).logits, want) < 1e-3
    kinds = {name.rpartition(".")[2]: type(layer) for name, layer in plain.named_modules() if "proj" in name}
    assert kinds["q_proj"] is nn.Linear
    assert kinds["down_proj"] is bnb.nn.Linear4bit


def test_torchao_layers_beside_adapted_ones():
    torchao = pytest.importorskip("torchao.quantization")
    model = tiny.llama(1)
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig(), filter_fn=lambda m, name: name.endswith("_proj"))
    packed = model.model.layers[0].mlp.down_proj.weight
    adapted = trained(lowdim.adapt(model, LoRA(rank=2, target_modules=["q_proj"])))
    ids = torch.arange(8).view(1, 8)
    want = model(ids).logits
    plain = adapted.merge()
    assert relative_error(plain(ids).logits, want) < 1e-4
    assert plain.model.layers[0].mlp.down_proj.weight is packed
    assert not packed.requires_grad
    assert plain.model.embed_tokens.weight.requires_grad


def test_copies_are_independent_of_the_merge():
    adapted = trained(lowdim.adapt(small_model(), LoRA(rank=2)))
    other = copy.deepcopy(adapted)
    adapted.merge()
    assert all(isinstance(other.model.get_submodule(name), AdaptedLayer) for name in other.layers)

"""Models with layers that are not plain: scaled embeddings, routers, experts, float8, wrappers, other libraries' adapters."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lowdim
from lowdim.adapters import FLoRA, LaMDA, LoRA, SoRA
from lowdim.compress import LoRDConfig
from lowdim.errors import NoMatchingModuleError
from lowdim.layers import Monarch, swap_linear

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
IDS = torch.randint(3, 30, (2, 6), generator=torch.Generator().manual_seed(1))


def disturb(adapted, size=0.1):
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for layer in adapted.layers.values():
            for p in layer.update.parameters():
                if p.requires_grad:
                    p.add_((size * torch.randn(p.shape, generator=generator)).to(p.dtype))


def made(kind, config):
    torch.manual_seed(0)
    return kind(config).eval()


def told(make):
    """The warnings of a call, and its result."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        result = make()
    return [str(w.message) for w in seen], result


# What a layer does beyond the product or the lookup


class Scaled(nn.Embedding):
    """An embedding of the user's own; nothing in its name or attributes tells the factor."""

    def forward(self, ids):
        return super().forward(ids) * 7.0


@pytest.mark.parametrize("kind", [LoRA, SoRA])
def test_an_update_is_scaled_as_its_embedding_is(kind, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(Scaled(9, 4))
    ids, weight = torch.tensor([[1, 2, 8]]), model[0].weight.detach().clone()
    adapted = lowdim.adapt(model, kind(rank=2, target_modules=["0"]))
    disturb(adapted)
    out = model(ids)
    torch.testing.assert_close(out, 7.0 * (weight + adapted.layers["0"].delta().T)[ids])
    adapted.save(tmp_path)
    twin = nn.Sequential(Scaled(9, 4))
    twin[0].weight.data = weight.clone()
    lowdim.load_adapter(twin, tmp_path)
    assert torch.equal(twin(ids), out)
    torch.testing.assert_close(adapted.merge()(ids), out)


@pytest.mark.parametrize("kind", [LoRA, SoRA])
def test_the_row_of_padding_is_not_trained(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(6, 4, padding_idx=2), nn.Linear(4, 1))
    before = model[0].weight.detach().clone()
    adapted = lowdim.adapt(model, kind(rank=2, target_modules=["0"]))
    optimizer = torch.optim.AdamW(adapted.param_groups(0.1))
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.arange(6)).square().sum().backward()
        optimizer.step()
    after = adapted.merge()[0].weight
    assert torch.equal(after[2], before[2])
    assert bool(((after - before).abs().sum(1) > 1e-4)[[0, 1, 3, 4, 5]].all())


def gemma():
    T = pytest.importorskip("transformers")
    return made(T.Gemma3ForCausalLM, T.Gemma3TextConfig(**SIZES, head_dim=8)), "embed_tokens", lambda m: m(IDS).logits


def bart():
    T = pytest.importorskip("transformers")
    sizes = {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = T.BartConfig(vocab_size=32, d_model=16, encoder_layers=1, decoder_layers=1, **sizes, scale_embedding=True)
    return made(T.BartModel, config), "encoder.embed_tokens", lambda m: m.encoder(IDS).last_hidden_state


def own_class():
    """PEFT knows scales only by the attribute `embed_scale`, so the export has this one in its factors."""
    torch.manual_seed(0)
    return nn.Sequential(Scaled(32, 4), nn.Linear(4, 3)), "0", lambda m: m(IDS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("make", [gemma, bart, own_class])
def test_scaled_embeddings_agree_adapted_merged_and_in_peft(make, dtype, tmp_path):
    PeftModel = pytest.importorskip("peft").PeftModel
    model, name, run = make()
    model.to(dtype)
    base = copy.deepcopy(model)
    adapted = lowdim.adapt(model, LoRA(rank=2, target_modules=[name]))
    disturb(adapted, 1.0)
    with torch.no_grad():
        want, before = run(model), run(base)
    allowed = (1e-5 if dtype == torch.float32 else 0.05) * float(want.abs().max())
    assert (want - before).abs().max() > 5 * allowed
    assert adapted.export(tmp_path).exact
    peft = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    again = copy.deepcopy(base)
    lowdim.load_adapter(again, tmp_path)
    with torch.no_grad():
        assert (run(again) - want).abs().max() < allowed
        assert (run(peft.base_model.model) - want).abs().max() < allowed
        assert (run(adapted.merge()) - want).abs().max() < allowed


@pytest.mark.parametrize("name", ["OPT", "Bart", "Whisper"])
def test_embeddings_of_positions_are_refused_by_name(name):
    T = pytest.importorskip("transformers")
    sizes = {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    layers = {"encoder_layers": 1, "decoder_layers": 1}
    if name == "OPT":
        heads = {"num_attention_heads": 2, "word_embed_proj_dim": 16}
        model = T.OPTModel(T.OPTConfig(vocab_size=32, hidden_size=16, ffn_dim=16, num_hidden_layers=1, **heads))
    elif name == "Bart":
        model = bart()[0]
    else:
        model = T.WhisperModel(T.WhisperConfig(vocab_size=64, d_model=16, **layers, **sizes, **tokens))
    with pytest.raises(NoMatchingModuleError, match=r"embed_positions.*forward method has arguments beyond the input"):
        lowdim.adapt(model, LoRA(rank=2, target_modules=["decoder.embed_positions"]))


# Mixtures of experts


def test_routers_are_left_out_and_refused_by_name():
    T = pytest.importorskip("transformers")
    config = T.Llama4TextConfig(
        **SIZES, intermediate_size_mlp=24, head_dim=8, num_local_experts=4, num_experts_per_tok=1, interleave_moe_layer_step=1
    )
    model = made(T.Llama4ForCausalLM, config)
    want = model(IDS).logits
    notes, adapted = told(lambda: lowdim.adapt(model, LoRA(rank=2)))
    assert not any("router" in name for name in adapted.layers)
    assert torch.equal(model(IDS).logits, want)
    assert any("model.layers.*.feed_forward.experts.gate_up_proj" in note for note in notes)
    fresh = made(T.Llama4ForCausalLM, config)
    with pytest.raises(NoMatchingModuleError, match=r"router \(Llama4Router .*returns a tuple"):
        lowdim.adapt(fresh, LoRA(rank=2, target_modules=["router"]))
    assert all(p.requires_grad for p in fresh.parameters())
    assert not any(
        "router" in name for name, m in swap_linear(fresh, Monarch, nblocks=2).named_modules() if isinstance(m, Monarch)
    )


def experts():
    T = pytest.importorskip("transformers")
    sparse = {"moe_intermediate_size": 16, "num_experts": 4, "shared_expert_intermediate_size": 16, "decoder_sparse_step": 1}
    return made(T.Qwen2MoeForCausalLM, T.Qwen2MoeConfig(**SIZES, **sparse))


@pytest.mark.parametrize(
    "targets",
    [None, "all-linear", ["q_proj", "down_proj"], r".*(q_proj|down_proj)"],
)
def test_experts_that_are_not_reached_are_named_with_their_share(targets):
    model = experts()
    stacked = {n: p for n, p in model.named_parameters() if ".experts." in n}
    reached = stacked if targets in (None, "all-linear") else {n: p for n, p in stacked.items() if "down" in n}
    share = sum(p.numel() for p in reached.values()) / sum(p.numel() for p in model.parameters())
    notes, _ = told(lambda: lowdim.adapt(model, LoRA(rank=1, target_modules=targets)))
    (note,) = [note for note in notes if "not adapted" in note]
    assert f"{share:.0%} of the model's parameters" in note
    assert "model.layers.*.mlp.experts.down_proj" in note


def test_no_word_is_said_of_experts_that_were_not_asked_for():
    notes, _ = told(lambda: lowdim.adapt(experts(), LoRA(rank=2, target_modules=["q_proj"])))
    assert not notes
    notes, _ = told(lambda: lowdim.adapt(nn.Sequential(nn.Linear(4, 4), nn.Embedding(3, 4)), LoRA(rank=2)))
    assert not notes


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (
            "experts.gate_up_proj",
            r"is a parameter, not a layer: model\.layers\.0\.mlp\.experts\.gate_up_proj of shape \(4, 32, 16\)",
        ),
        ("gate_up_proj", "is a parameter, not a layer"),
        ("experts", r"keeps its weights as stacked parameters \(model\.layers\.0\.mlp\.experts\.gate_up_proj"),
    ],
)
def test_experts_that_are_asked_for_by_name_are_refused_with_the_reason(name, reason):
    with pytest.raises(NoMatchingModuleError, match=reason):
        lowdim.adapt(experts(), LoRA(rank=2, target_modules=[name]))


def test_matrices_that_attention_keeps_by_itself_are_named():
    block = nn.TransformerEncoderLayer(8, 2, 16)
    notes, adapted = told(lambda: lowdim.adapt(nn.ModuleList([block]), LoRA(rank=2)))
    assert list(adapted.layers) == ["0.linear1", "0.linear2"]
    assert any("*.self_attn.in_proj_weight" in note and "experts" not in note for note in notes)


def test_transposed_convolutions_are_named_and_not_called_experts():
    notes, _ = told(lambda: lowdim.adapt(nn.Sequential(nn.ConvTranspose1d(4, 4, 3), nn.Linear(4, 4)), LoRA(rank=2)))
    assert len(notes) == 1
    assert "(*.weight; 67% of the model's parameters)" in notes[0]
    assert "experts" not in notes[0]


# Weights in few bits


def coded(dense, rows, columns, dtype=torch.float8_e4m3fn, most=448.0):
    """Codes and scales of blocks `(rows, columns)`, and the values that they stand for."""
    blocks = dense.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
    scale = blocks.abs().amax((1, 3), keepdim=True) / most
    codes = (blocks / scale).to(torch.float32)
    codes = (codes.round() if dtype == torch.int8 else codes).to(dtype)
    values = (codes.float() * scale).flatten(2).flatten(0, 1)
    return codes.flatten(2).flatten(0, 1), scale[:, 0, :, 0], values


def fine_grained(out, inputs, block):
    FP8Linear = pytest.importorskip("transformers.integrations.finegrained_fp8").FP8Linear
    torch.manual_seed(0)
    layer = FP8Linear(inputs, out, block_size=block)
    codes, scale, values = coded(torch.randn(out, inputs) * 0.05, *(block or (out, inputs)))
    layer.weight.data, layer.weight_scale_inv.data = codes, scale if block else scale.reshape(())
    return layer, values


class EightBits(nn.Linear):
    """A layer of the user's own: codes of `dtype`, one scale a row, multiplied or divided by."""

    def __init__(self, out, inputs, dtype, divided=False):
        super().__init__(inputs, out)
        torch.manual_seed(0)
        codes, scale, self.values = coded(torch.randn(out, inputs), 1, inputs, dtype, 127.0 if dtype == torch.int8 else 448.0)
        self.weight, self.divided = nn.Parameter(codes, requires_grad=False), divided
        self.register_buffer("s", 1 / scale if divided else scale)

    def forward(self, x):
        codes = self.weight.to(x.dtype)
        return F.linear(x, codes / self.s if self.divided else codes * self.s, self.bias)


QUANTIZED = {
    "blocks": lambda: fine_grained(8, 12, (4, 6)),
    "one scale": lambda: fine_grained(8, 12, None),
    "float8": lambda: (layer := EightBits(8, 12, torch.float8_e4m3fn), layer.values),
    "float8 divided": lambda: (layer := EightBits(8, 12, torch.float8_e4m3fn, divided=True), layer.values),
    "float8_e5m2": lambda: (layer := EightBits(8, 12, torch.float8_e5m2), layer.values),
    "int8": lambda: (layer := EightBits(8, 12, torch.int8), layer.values),
}


@pytest.mark.parametrize("method", [LoRA(rank=2), LaMDA(rank=2)], ids=["LoRA", "LaMDA"])
@pytest.mark.parametrize("name", QUANTIZED)
def test_a_weight_in_few_bits_is_read_with_its_scales(name, method):
    layer, values = QUANTIZED[name]()
    adapted = lowdim.adapt(nn.Sequential(layer), method)
    found = adapted.layers["0"]
    torch.testing.assert_close(found.pristine_weight(), values, rtol=1e-5, atol=1e-6)
    disturb(adapted)
    want = values + found.delta()
    merged = adapted.merge()[0]
    assert type(merged) is nn.Linear
    torch.testing.assert_close(merged.weight.detach(), want, rtol=1e-5, atol=1e-6)


def test_a_layer_that_does_not_tell_its_dtype_is_merged_in_the_models():
    layer, _ = fine_grained(8, 12, (4, 6))
    model = nn.Sequential(nn.Linear(12, 12).bfloat16(), layer)
    assert lowdim.adapt(model, LoRA(rank=2)).merge()[1].weight.dtype == torch.bfloat16
    model = nn.Sequential(nn.Linear(12, 12).bfloat16(), fine_grained(8, 12, (4, 6))[0])
    swapped = swap_linear(model, Monarch, ["1"], nblocks=2)
    assert next(swapped[1].parameters()).dtype == torch.bfloat16


def test_conversions_read_a_weight_in_few_bits_with_its_scales():
    layer, values = QUANTIZED["int8"]()
    plain = nn.Linear(12, 8)
    plain.weight.data, plain.bias.data = values.clone(), layer.bias.detach().clone()
    x = torch.randn(3, 12)
    got, want = (swap_linear(nn.Sequential(m), Monarch, nblocks=2)(x) for m in (layer, plain))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_codes_without_known_scales_are_refused():
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(TypeError, match=r"layer 0.*not floating point but float8_e4m3fn.*load the model without quantization"):
        lowdim.adapt(nn.Sequential(layer), LoRA(rank=2))


class Packed(nn.Module):
    """A quantized layer that is no nn.Linear, as GPTQ's and AWQ's are."""

    def __init__(self):
        super().__init__()
        self.in_features = self.out_features = 8
        self.register_buffer("qweight", torch.zeros(1, 8, dtype=torch.int32))
        self.register_buffer("scales", torch.ones(1, 8))


def test_quantized_layers_of_other_classes_are_named():
    with pytest.raises(NoMatchingModuleError, match=r"0 .Packed.* is left out: it keeps its weight quantized"):
        lowdim.adapt(nn.Sequential(Packed()), LoRA(rank=2))
    notes, adapted = told(lambda: lowdim.adapt(nn.Sequential(Packed(), nn.Linear(8, 8)), LoRA(rank=2)))
    assert list(adapted.layers) == ["1"]
    assert any("Packed" in note for note in notes)


# Wrappers


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3)))


def part_compiled():
    model = net()
    model[2] = torch.compile(model[2], backend="eager")
    return model


def leaf_compiled():
    model = net()
    model[0] = torch.compile(model[0], backend="eager")
    return model


def checkpointed():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = net()
    model[2] = checkpoint_wrapper(model[2])
    return model


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


WRAPPED = {
    "compiled": lambda: torch.compile(net(), backend="eager"),
    "part compiled": part_compiled,
    "leaf compiled": leaf_compiled,
    "checkpointed": checkpointed,
    "DataParallel": lambda: nn.DataParallel(net()),
    "DDP": lambda: nn.parallel.DistributedDataParallel(net()),
    "compiled DDP": lambda: torch.compile(nn.parallel.DistributedDataParallel(net()), backend="eager"),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_what_is_saved_has_the_plain_models_names(name, tmp_path, one_process):
    x = torch.randn(2, 8, generator=torch.Generator().manual_seed(1))
    wrapped = WRAPPED[name]()
    adapted = lowdim.adapt(wrapped, LoRA(rank=2, target_modules=["0", "2.0"]), modules_to_save=["2.1"])
    assert list(adapted.layers) == ["0", "2.0"]
    assert set(adapted.trainable()) == {*(f"{n}.update.{f}" for n in ("0", "2.0") for f in "AB"), "2.1.weight", "2.1.bias"}
    disturb(adapted)
    want = wrapped(x)
    adapted.save(tmp_path / "a")
    plain = net()
    lowdim.load_adapter(plain, tmp_path / "a")
    torch.testing.assert_close(plain(x), want)
    again = WRAPPED[name]()
    lowdim.load_adapter(again, tmp_path / "a")
    torch.testing.assert_close(again(x), want)
    merged = adapted.merge()
    torch.testing.assert_close(wrapped(x), want)
    torch.testing.assert_close(merged(x), want)
    adapted.unmerge()
    torch.testing.assert_close(wrapped(x), want)


def test_base_name_and_task_type_of_a_wrapped_model_are_kept(tmp_path):
    T = pytest.importorskip("transformers")
    import json

    model = made(T.LlamaForCausalLM, T.LlamaConfig(**SIZES))
    model.config._name_or_path = "somewhere/base"
    adapted = lowdim.adapt(torch.compile(model, backend="eager"), LoRA(rank=2, target_modules=["q_proj"]))
    assert adapted.description()["base_model"] == {"class": "LlamaForCausalLM", "name_or_path": "somewhere/base"}
    adapted.export(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["task_type"]) == ("somewhere/base", "CAUSAL_LM")


def test_models_wrapped_for_several_processes_are_refused(monkeypatch, one_process):
    wrapped = nn.parallel.DistributedDataParallel(net())
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: 2)
    with pytest.raises(ValueError, match=r"adapt model\.module first, then wrap it"):
        lowdim.adapt(wrapped, LoRA(rank=2))

    class FullyShardedDataParallel(nn.Module):
        pass

    with pytest.raises(ValueError, match="adapt the plain model first"):
        lowdim.adapt(nn.Sequential(FullyShardedDataParallel()), LoRA(rank=2))


# Other libraries' adapters


class OwnLoRA(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base, self.lora_A, self.lora_B = base, nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False)


def with_peft(kind):
    peft = pytest.importorskip("peft")
    config = {
        "lora": lambda: peft.LoraConfig(r=2, target_modules=["0"]),
        "loha": lambda: peft.LoHaConfig(r=2, target_modules=["0"]),
        "vera": lambda: peft.VeraConfig(r=2, target_modules=["0"]),
        "ia3": lambda: peft.IA3Config(target_modules=["0"], feedforward_modules=[]),
    }
    if kind == "injected":
        return peft.inject_adapter_in_model(config["lora"](), net())
    return peft.get_peft_model(net(), config[kind]())


FOREIGN = {
    **{kind: lambda kind=kind: with_peft(kind) for kind in ("lora", "loha", "vera", "ia3", "injected")},
    "own": lambda: nn.Sequential(OwnLoRA(nn.Linear(8, 8))),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_model_with_another_librarys_adapter_is_refused_with_the_way_on(name, tmp_path):
    lowdim.adapt(net(), LoRA(rank=2)).save(tmp_path)
    model = FOREIGN[name]()
    flags = [p.requires_grad for p in model.parameters()]
    refused = pytest.raises(ValueError, match=r"already carries an adapter that lowdim did not make.*merge_and_unload")
    for use in (
        lambda: lowdim.adapt(model, LoRA(rank=2)),
        lambda: lowdim.adapt(model, lowdim.adapters.SAID(dimension=4)),
        lambda: lowdim.load_adapter(model, tmp_path),
        lambda: lowdim.adapters.AdapterSet(model),
        lambda: swap_linear(model, Monarch, nblocks=2),
    ):
        with refused:
            use()
    assert [p.requires_grad for p in model.parameters()] == flags


def test_a_merged_peft_model_is_adapted():
    model = with_peft("lora").merge_and_unload()
    assert len(lowdim.adapt(model, LoRA(rank=2)).layers) == 3


# Options


@pytest.mark.parametrize(
    ("method", "options", "told"),
    [
        (FLoRA, {"rank": 4}, r"FLoRA has no option 'rank' \(nearest: ranks\); its options are ranks, "),
        (LoRA, {"r": 4, "lora_alpha": 2}, r"LoRA has no option 'r', 'lora_alpha' \(nearest: .*rank"),
        (LaMDA, {"ranks": 4}, r"LaMDA has no option 'ranks' \(nearest: rank"),
    ],
)
def test_an_unknown_option_names_the_methods_own(method, options, told):
    with pytest.raises(TypeError, match=told):
        method(**options)


def test_configurations_and_layers_name_their_options_too():
    for make in (lambda: LoRDConfig(param_ration=0.5), lambda: lowdim.train.FitSettings(learning_rate=0.1)):
        with pytest.raises(TypeError, match=r"has no option '(param_ration|learning_rate)'.*its options are "):
            make()
    for fresh in (True, False):
        with pytest.raises(TypeError, match=r"Monarch has no option 'blocks' \(nearest: nblocks\); its options are nblocks"):
            swap_linear(net(), Monarch, blocks=2, fresh=fresh)


@pytest.mark.parametrize("cls", lowdim.adapters.registered_methods().values(), ids=lambda cls: cls.__name__)
def test_every_method_names_its_options(cls):
    with pytest.raises(TypeError, match=rf"{cls.__name__} has no option 'no_such'.*its options are "):
        cls(no_such=1)

"""A LoRA that PEFT wrote gives the same logits here as there, or is refused with the reason."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lowdim
import zoo
from lowdim.adapters import AdaptedLayer, AdapterSet, LoRA
from lowdim.adapters.core.files.peft_options import HARMLESS, PLAIN
from lowdim.errors import CheckpointError
from lowdim.testing.closeness import relative_error

peft = pytest.importorskip("peft")


def written(model, folder, save=None, **options):
    """PEFT's model after a training, saved to a folder."""
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "init_lora_weights": False, **options})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        wrapped = peft.get_peft_model(model, config).eval()
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if "modules_to_save" in name:
                    parameter.add_(0.05 * torch.randn_like(parameter))
    wrapped.save_pretrained(folder, **(save or {}))
    return wrapped


def same(name, folder, **options):
    tiny = zoo.MODELS[name]
    batch = tiny.batch()
    want = zoo.logits_of(written(tiny.build(), folder, **options), batch)
    model = tiny.build()
    before = zoo.logits_of(model, batch)
    adapted = lowdim.load_adapter(model, folder)
    assert relative_error(zoo.logits_of(model, batch), want) < 1e-5
    assert relative_error(want, before) > 1e-3
    return adapted, want, batch


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {"target_modules": ["q_proj"]}),
        ("llama", {"target_modules": "all-linear"}),
        ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
        ("llama", {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2}}),
        ("llama", {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"layers.0.self_attn.q_proj": 3}}),
        ("llama", {"target_modules": ["q_proj", "v_proj"], "alpha_pattern": {"^model.layers.1.self_attn.v_proj": 32}}),
        ("llama", {"target_modules": ["q_proj"], "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3}}),
        ("llama", {"target_modules": ["q_proj", "v_proj"], "use_rslora": True, "rank_pattern": {"v_proj": 2}}),
        ("llama", {"target_modules": ["q_proj"], "use_rslora": True}),
        ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "task_type": "CAUSAL_LM"}),
        ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
        ("llama-tied", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
        ("llama-tied", {"target_modules": ["q_proj", "embed_tokens"]}),
        ("llama-tied", {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}),
        ("llama", {"target_modules": "all-linear", "exclude_modules": ["up_proj"], "layers_pattern": None}),
        ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
        ("llama-classifier", {"target_modules": ["q_proj"], "task_type": "SEQ_CLS"}),
        ("bert-classifier", {"target_modules": ["query"], "task_type": "SEQ_CLS"}),
        ("distilbert-classifier", {"target_modules": ["q_lin"], "task_type": "SEQ_CLS"}),
        ("bert-tokens", {"target_modules": ["query"], "task_type": "TOKEN_CLS"}),
        ("bert-questions", {"target_modules": ["query"], "task_type": "QUESTION_ANS"}),
        ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
        ("gpt2", {"target_modules": ["c_attn", "c_proj", "wte"], "fan_in_fan_out": True, "rank_pattern": {"c_proj": 2}}),
        ("t5", {"target_modules": ["q", "v"], "task_type": "SEQ_2_SEQ_LM"}),
        ("whisper", {"target_modules": ["q_proj", "v_proj"]}),
        ("vit-classifier", {"target_modules": ["q_proj", "query", "projection"], "modules_to_save": ["classifier"]}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(sorted(map(str, value))),
)
def test_pefts_folder_has_the_same_logits(name, options, tmp_path):
    adapted, want, batch = same(name, tmp_path / "peft", **options)
    # and goes on from here: as our own folder, as PEFT's again, and merged
    adapted.save(tmp_path / "ours")
    again = zoo.MODELS[name].build()
    lowdim.load_adapter(again, tmp_path / "ours")
    assert relative_error(zoo.logits_of(again, batch), want) < 1e-5
    assert adapted.export(tmp_path / "back").exact
    loaded = peft.PeftModel.from_pretrained(zoo.MODELS[name].build(), tmp_path / "back").eval()
    assert relative_error(zoo.logits_of(loaded, batch), want) < 1e-5
    assert relative_error(zoo.logits_of(adapted.merge(), batch), want) < 1e-5


def test_what_lowdim_exports_comes_back(tmp_path):
    tiny = zoo.MODELS["bert-classifier"]
    adapted = lowdim.adapt(tiny.build(), LoRA(rank=2), modules_to_save=["classifier"])
    with torch.no_grad():
        for parameter in adapted.trainable().values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    adapted.export(tmp_path)
    model = tiny.build()
    loaded = lowdim.load_adapter(model, tmp_path)
    batch = tiny.batch()
    assert relative_error(zoo.logits_of(model, batch), zoo.logits_of(adapted.model, batch)) < 1e-5
    assert loaded.modules_to_save == ("classifier",)
    assert set(loaded.trainable()) == set(adapted.trainable())


def test_hyperparameters_are_kept_where_one_serves_all(tmp_path):
    adapted, *_ = same("llama", tmp_path, target_modules=["q_proj"], lora_dropout=0.1)
    assert (adapted.method.rank, adapted.method.alpha, adapted.method.dropout) == (4, 8, 0.1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_factors_in_16_bits_over_a_model_in_32(dtype, tmp_path):
    tiny = zoo.MODELS["llama"]
    written(tiny.build(), tmp_path / "peft", target_modules=["q_proj", "v_proj"], r=4)
    file = tmp_path / "peft" / "adapter_model.safetensors"
    save_file({name: value.to(dtype) for name, value in load_file(file).items()}, file, metadata={"format": "pt"})
    model, batch = tiny.build(), tiny.batch()
    want = zoo.logits_of(peft.PeftModel.from_pretrained(tiny.build(), tmp_path / "peft").eval(), batch)
    adapted = lowdim.load_adapter(model, tmp_path / "peft")
    assert relative_error(zoo.logits_of(model, batch), want) < 1e-6
    assert {p.dtype for p in adapted.trainable().values()} == {torch.float32}
    adapted.export(tmp_path / "again")
    again = peft.PeftModel.from_pretrained(tiny.build(), tmp_path / "again").eval()
    assert relative_error(zoo.logits_of(again, batch), want) < 1e-6
    # what the model itself computes in 16 bits stays so
    adapted = lowdim.load_adapter(tiny.build().to(dtype), tmp_path / "peft")
    assert {p.dtype for p in adapted.trainable().values()} == {dtype}


def test_convolutions(tmp_path):
    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, stride=2), nn.Conv2d(6, 4, 1))

    x = torch.randn(2, 3, 8, 8)
    want = written(build(), tmp_path, target_modules=["0", "1"])(x)
    model = build()
    lowdim.load_adapter(model, tmp_path)
    assert relative_error(model(x), want) < 1e-5


@pytest.mark.parametrize("options", [{"dilation": 2}, {"groups": 3}, {"padding": 1, "padding_mode": "circular"}])
def test_convolutions_that_peft_treats_in_its_own_way_are_refused(options, tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 6, 3, **options))
    written(nn.Sequential(nn.Conv2d(3, 6, 3, **options)), tmp_path, target_modules=["0"], r=3)
    with pytest.raises(CheckpointError, match="treats in its own way"):
        lowdim.load_adapter(model, tmp_path)


@pytest.mark.parametrize("start", [True, "gaussian", "orthogonal", "mica", "eva"])
def test_where_training_began_does_not_matter(start, tmp_path):
    tiny = zoo.MODELS["llama"]
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=start)
    wrapped = peft.get_peft_model(tiny.build(), config).eval()
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    wrapped.save_pretrained(tmp_path)
    model = tiny.build()
    lowdim.load_adapter(model, tmp_path)
    assert relative_error(zoo.logits_of(model, tiny.batch()), zoo.logits_of(wrapped, tiny.batch())) < 1e-5


MORE = [
    ("bert", {"use_dora": True}, "use_dora=True means DoRA"),
    ("bert", {"bias": "lora_only"}, "bias='lora_only' means trained biases"),
    ("bert", {"bias": "all"}, "bias='all' means trained biases"),
    ("bert", {"lora_bias": True}, "lora_bias=True means a bias of B"),
    ("bert", {"init_lora_weights": "pissa"}, "init_lora_weights='pissa' means a start that changes the base"),
    ("bert", {"init_lora_weights": "olora"}, "init_lora_weights='olora' means a start that changes the base"),
    ("bert", {"trainable_token_indices": [1]}, "trainable_token_indices=.* means trained rows of the embedding"),
    ("llama", {"alora_invocation_tokens": [5], "task_type": "CAUSAL_LM"}, "alora_invocation_tokens=.* means aLoRA"),
    ("qwen3-moe", {"target_parameters": ["experts.down_proj"]}, "target_parameters=.* means factors of parameters"),
]


@pytest.mark.parametrize(("name", "options", "reason"), MORE, ids=[next(iter(options)) for _, options, _ in MORE])
def test_more_than_two_factors_is_refused(name, options, reason, tmp_path):
    targets = ["query"] if name == "bert" else ["q_proj"]
    written(zoo.MODELS[name].build(), tmp_path, target_modules=targets, **options)
    model = zoo.MODELS[name].build()
    before = zoo.logits_of(model, zoo.MODELS[name].batch())
    with pytest.raises(CheckpointError, match=rf"adapter_config\.json: {reason}.*merge it with PEFT \(merge_and_unload\)"):
        lowdim.load_adapter(model, tmp_path)
    assert torch.equal(zoo.logits_of(model, zoo.MODELS[name].batch()), before)
    assert all(p.requires_grad for p in model.parameters())


def test_every_option_of_pefts_lora_is_known():
    """An option that a later PEFT adds is looked at before folders with it are read."""
    assert set(peft.LoraConfig().to_dict()) <= PLAIN.keys() | HARMLESS


@pytest.mark.parametrize("value", [True, {"x": 1}, "some"])
def test_an_option_of_a_later_peft_is_refused(value, tmp_path):
    written(zoo.MODELS["llama"].build(), tmp_path, target_modules=["q_proj"])
    content = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**content, "use_nextra": value}))
    with pytest.raises(CheckpointError, match="lowdim does not know the option use_nextra"):
        lowdim.load_adapter(zoo.MODELS["llama"].build(), tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({**content, "use_nextra": None}))
    lowdim.load_adapter(zoo.MODELS["llama"].build(), tmp_path)


def test_another_method_of_pefts_is_refused(tmp_path):
    model = zoo.MODELS["llama"].build()
    peft.get_peft_model(model, peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"holds PEFT's 'IA3'; lowdim reads its LORA: merge it with PEFT"):
        lowdim.load_adapter(zoo.MODELS["llama"].build(), tmp_path)


@pytest.mark.parametrize("kind", [*sorted(k.value for k in peft.PeftType if k.value != "LORA"), "NEXTRA"])
def test_every_other_type_is_refused_by_name(kind, tmp_path):
    """By its configuration alone, whatever else is in it: AdaLoRA's rank_pattern holds lists."""
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": kind, "rank_pattern": {"x": [True]}}))
    with pytest.raises(
        CheckpointError, match=rf"holds PEFT's '{kind}'; lowdim reads its LORA: (merge it|nothing in it can be)"
    ):
        lowdim.load_adapter(zoo.MODELS["llama"].build(), tmp_path)


def test_a_copy_of_a_weight_that_the_model_shares_is_refused(tmp_path):
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        written(zoo.MODELS["llama-tied"].build(), tmp_path, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    with pytest.raises(CheckpointError, match=r"shares with lm_head\.weight, which PEFT leaves as it was"):
        lowdim.load_adapter(zoo.MODELS["llama-tied"].build(), tmp_path)


def test_a_pickle_is_refused_unread(tmp_path):
    written(zoo.MODELS["llama"].build(), tmp_path, save={"safe_serialization": False}, target_modules=["q_proj"])
    assert (tmp_path / "adapter_model.bin").is_file()

    class Evil:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",))

    for number in range(2):
        with pytest.raises(
            CheckpointError, match=r"adapter_model\.bin is a pickle.*reads adapter_model\.safetensors.*save it again"
        ):
            lowdim.load_adapter(zoo.MODELS["llama"].build(), tmp_path)
        if not number:
            torch.save({"x": Evil()}, tmp_path / "adapter_model.bin")
    assert not (tmp_path / "ran").exists()


def test_a_part_of_a_folder_is_missing(tmp_path):
    written(zoo.MODELS["llama"].build(), tmp_path, target_modules=["q_proj"])
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).unlink()
        with pytest.raises(CheckpointError, match=rf"{name} does not exist"):
            lowdim.load_adapter(zoo.MODELS["llama"].build(), tmp_path)
        (tmp_path / name).write_bytes(content)


def test_the_folder_above_names_the_adapters_in_it(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    wrapped = peft.get_peft_model(zoo.MODELS["llama"].build(), config, adapter_name="verse")
    wrapped.add_adapter("prose", config)
    wrapped.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="holds no adapter itself; PEFT saved prose, verse in it: name one of these"):
        lowdim.load_adapter(zoo.MODELS["llama"].build(), tmp_path)
    lowdim.load_adapter(zoo.MODELS["llama"].build(), tmp_path / "verse")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, t: c.update(r="4"), "r: Input should be a valid integer"),
        (lambda c, t: c.update(r=0), "r: Input should be greater"),
        (lambda c, t: c.update(r=5), "has factors of rank 4, and adapter_config.json says 5"),
        (lambda c, t: c.update(lora_alpha=None), "lora_alpha: Input should be a valid number"),
        (lambda c, t: c.update(lora_alpha=float("nan")), "lora_alpha: Input should be a finite number"),
        (lambda c, t: c.update(rank_pattern={"(": 4}), "is no regular expression"),
        (lambda c, t: c.update(rank_pattern=[1]), "rank_pattern: Input should be a valid dictionary"),
        (lambda c, t: c.update(modules_to_save="x"), "modules_to_save: Input should be a valid list"),
        (lambda c, t: c.pop("peft_type"), "peft_type: Field required"),
        (lambda c, t: c.update(peft_type={}), "peft_type: Input should be a valid string"),
        (lambda c, t: t.pop(next(k for k in t if "lora_A" in k)), "has one of its two factors"),
        (lambda c, t: t.clear(), "holds no factors"),
        (lambda c, t: t.update({"base_model.model.head.weight": torch.ones(2)}), "holds module head, which the model lacks"),
        (lambda c, t: t.update({"base_model.model.x.lora_magnitude_vector": torch.ones(2)}), "is no factor of a LoRA"),
        (
            lambda c, t: t.update({k: v[:, :9].contiguous() for k, v in t.items() if "lora_A" in k}),
            r"by factors of shape .*; the model's layer",
        ),
        (lambda c, t: t.update({k: v.int() for k, v in t.items()}), "which lowdim's LoRA cannot"),
        (lambda c, t: t.update({k: v.flatten() for k, v in t.items()}), r"factors of shape \(128,\) and \(128,\) \(shards"),
        (lambda c, t: t.update({k: v[:, :0].contiguous() for k, v in t.items()}), "shards that were not gathered"),
        (
            lambda c, t: [t.update({k.replace("q_proj", "z_proj"): t.pop(k)}) for k in list(t)],
            r"adapts layer .*z_proj and 1 more, which the model lacks \(nearest: .*_proj",
        ),
    ],
)
def test_damage(change, message, tmp_path):
    written(zoo.MODELS["llama"].build(), tmp_path, target_modules=["q_proj"])
    config, tensors = (
        json.loads((tmp_path / "adapter_config.json").read_text()),
        load_file(tmp_path / "adapter_model.safetensors"),
    )
    change(config, tensors)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    model = zoo.MODELS["llama"].build()
    with pytest.raises(CheckpointError, match=message):
        lowdim.load_adapter(model, tmp_path)
    assert not any(isinstance(module, AdaptedLayer) for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_several_of_pefts_are_combined(tmp_path):
    tiny = zoo.MODELS["llama"]
    for name, targets in (("one", ["q_proj"]), ("two", ["q_proj", "v_proj"])):
        written(tiny.build(), tmp_path / name, target_modules=targets, r=2 if name == "one" else 3)
    adapters = AdapterSet(tiny.build())
    for name in ("one", "two"):
        adapters.add(name, tmp_path / name)
    result = adapters.combine("sum", {"one": 0.5, "two": 2.0})
    assert result.exact
    layer = "model.layers.0.self_attn.q_proj"
    parts = [adapters[name].layers[layer].update.delta() for name in ("one", "two")]
    assert relative_error(adapters["sum"].layers[layer].update.delta(), 0.5 * parts[0] + 2.0 * parts[1]) < 1e-5
    # an idle one of the set is written as it is when it is active
    assert adapters.active == {"sum": 1.0}
    adapters["two"].export(tmp_path / "again")
    want, got = (
        zoo.logits_of(peft.PeftModel.from_pretrained(tiny.build(), tmp_path / name).eval(), tiny.batch())
        for name in ("two", "again")
    )
    assert relative_error(got, want) < 1e-5
    assert adapters.active == {"sum": 1.0}
    assert relative_error(adapters["sum"].layers[layer].delta(), 0.5 * parts[0] + 2.0 * parts[1]) < 1e-5


def test_peft_loads_what_was_cut_and_the_error_is_that_of_the_best(tmp_path):
    tiny = zoo.MODELS["llama"]
    options = {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 5}}
    written(tiny.build(), tmp_path / "whole", use_rslora=True, **options)
    adapted = lowdim.load_adapter(tiny.build(), tmp_path / "whole")
    whole = {name: layer.delta().double() for name, layer in adapted.layers.items()}
    assert all(len(layer.update.A) == (4 if "q_proj" in name else 2) for name, layer in adapted.layers.items())
    result = adapted.export(tmp_path / "cut", rank=3)
    loaded = peft.PeftModel.from_pretrained(tiny.build(), tmp_path / "cut").base_model.model
    for name, delta in whole.items():
        values = torch.linalg.svdvals(delta)
        best = float(values[3:].norm() / values.norm())
        cut = loaded.get_submodule(name).get_delta_weight("default").double()
        assert float((cut - delta).norm() / delta.norm()) == pytest.approx(best, abs=1e-6)
        assert result.errors[name] == pytest.approx(best, abs=1e-6)
        assert (result.ranks[name], result.whole_ranks[name]) == ((3, 4) if "q_proj" in name else (2, 2))
        assert (best > 0.05) == ("q_proj" in name)
    record = json.loads((tmp_path / "cut" / "ranks.json").read_text())
    assert record["rank"] == 3
    assert record["layers"] == result.rows()
    with pytest.raises(ValueError, match=r"rank=5 is above what is there: the update has ranks from 2 to 4 \(.*q_proj: 4\)"):
        adapted.export(tmp_path / "more", rank=5)
    assert not (tmp_path / "more").exists()
    again = adapted.export(tmp_path / "cut", rank=4)
    assert again.exact
    assert json.loads((tmp_path / "cut" / "ranks.json").read_text())["layers"] == again.rows()


def test_two_heads_of_one_name_do_not_share_a_set(tmp_path):
    """PEFT has a copy of the head for each adapter; a set has the model's, and would answer with the last one's."""
    tiny = zoo.MODELS["llama"]
    for name, saved in (("one", ["lm_head"]), ("two", ["lm_head"]), ("three", None)):
        written(tiny.build(), tmp_path / name, target_modules=["q_proj"], modules_to_save=saved)
    path = tmp_path / "two" / "adapter_model.safetensors"
    save_file({key: 2 * value for key, value in load_file(path).items()}, path)
    adapters = AdapterSet(tiny.build().eval())
    adapters.add("one", tmp_path / "one")
    want, names = zoo.logits_of(adapters.model, tiny.batch()), [name for name, _ in adapters.model.named_modules()]
    with pytest.raises(ValueError, match=r"has another state of module lm_head than adapter 'one'.*delete\('one'\) first"):
        adapters.add("two", tmp_path / "two")
    assert torch.equal(zoo.logits_of(adapters.model, tiny.batch()), want)
    assert adapters.active == {"one": 1.0}
    assert [name for name, _ in adapters.model.named_modules()] == names
    adapters.add("same", tmp_path / "one")  # the same head
    adapters.add("three", tmp_path / "three")  # no head
    adapters.activate("one")
    assert relative_error(zoo.logits_of(adapters.model, tiny.batch()), want) < 1e-6
    for name in ("one", "same"):
        adapters.delete(name)
    adapters.add("two", tmp_path / "two")


@pytest.mark.parametrize("saved", [(), ("lm_head",)])
def test_swapping_in_another_folder_of_pefts(saved, tmp_path):
    """The numbers, the scale, the dropout and what is saved whole; the tensors stay, so that an optimizer does."""
    tiny = zoo.MODELS["llama"]
    want = {}
    for name, alpha in (("one", 8), ("two", 2)):
        options = {"lora_alpha": alpha, "lora_dropout": alpha / 40, "modules_to_save": list(saved)}
        wrapped = written(tiny.build(), tmp_path / name, target_modules=["q_proj", "v_proj"], **options)
        if name == "two":
            with torch.no_grad():
                for key, parameter in wrapped.named_parameters():
                    if "lora_" in key or "modules_to_save" in key:
                        parameter.mul_(-1.5)
            wrapped.save_pretrained(tmp_path / name)
        want[name] = zoo.logits_of(wrapped, tiny.batch())
    assert relative_error(want["one"], want["two"]) > 1e-3
    adapters = AdapterSet(tiny.build().eval())
    adapters.add("now", tmp_path / "one")
    before = list(adapters["now"].trainable().values())
    for name in ("two", "one"):
        adapters.swap("now", tmp_path / name)
        assert relative_error(zoo.logits_of(adapters.model, tiny.batch()), want[name]) < 1e-5
        adapters["now"].save(tmp_path / "saved")
        again = tiny.build()
        lowdim.load_adapter(again, tmp_path / "saved")
        assert relative_error(zoo.logits_of(again, tiny.batch()), want[name]) < 1e-5
    after = list(adapters["now"].trainable().values())
    assert len(before) == len(after)
    assert all(a is b for a, b in zip(before, after, strict=True))
    assert {layer.dropout for layer in adapters["now"].layers.values()} == {0.2}


@pytest.mark.parametrize("how", [{"rank": 2}, {"max_error": 0.1}], ids=lambda how: next(iter(how)))
def test_cutting_what_is_not_finite_names_the_layer(how, tmp_path):
    tiny = zoo.MODELS["llama"]
    written(tiny.build(), tmp_path / "peft", target_modules=["q_proj", "v_proj"])
    adapted = lowdim.load_adapter(tiny.build(), tmp_path / "peft")
    layer = adapted.layers["model.layers.0.self_attn.v_proj"]
    with torch.no_grad():
        next(p for p in layer.parameters() if p.requires_grad)[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"layer model\.layers\.0\.self_attn\.v_proj .* NaN or infinite entries"):
        adapted.export(tmp_path / "out", **how)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())

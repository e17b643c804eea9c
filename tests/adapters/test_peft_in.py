"""A LoRA that PEFT wrote gives the same logits here as there, or is refused with the reason."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lowdim
import zoo
from lowdim.adapters import AdaptedLayer, AdapterSet, LoRA
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
        ("llama-classifier", {"target_modules": ["q_proj"], "task_type": "SEQ_CLS"}),
        ("bert-classifier", {"target_modules": ["query"], "task_type": "SEQ_CLS"}),
        ("distilbert-classifier", {"target_modules": ["q_lin"], "task_type": "SEQ_CLS"}),
        ("bert-tokens", {"target_modules": ["query"], "task_type": "TOKEN_CLS"}),
        ("bert-questions", {"target_modules": ["query"], "task_type": "QUESTION_ANS"}),
        ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
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


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"use_dora": True}, "use_dora=True means more than B A"),
        ({"bias": "lora_only"}, "bias='lora_only' means more than B A"),
        ({"lora_bias": True}, "lora_bias=True means more than B A"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' means more than B A"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices=.* means more than B A"),
    ],
)
def test_more_than_two_factors_is_refused(options, reason, tmp_path):
    written(zoo.MODELS["bert"].build(), tmp_path, target_modules=["query"], **options)
    model = zoo.MODELS["bert"].build()
    before = zoo.logits_of(model, zoo.MODELS["bert"].batch())
    with pytest.raises(CheckpointError, match=reason):
        lowdim.load_adapter(model, tmp_path)
    assert torch.equal(zoo.logits_of(model, zoo.MODELS["bert"].batch()), before)
    assert all(p.requires_grad for p in model.parameters())


def test_another_method_of_pefts_is_refused(tmp_path):
    model = zoo.MODELS["llama"].build()
    peft.get_peft_model(model, peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="holds PEFT's 'IA3'; lowdim reads its LORA"):
        lowdim.load_adapter(zoo.MODELS["llama"].build(), tmp_path)


def test_a_copy_of_a_weight_that_the_model_shares_is_refused(tmp_path):
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        written(zoo.MODELS["llama-tied"].build(), tmp_path, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    with pytest.raises(CheckpointError, match=r"shares with lm_head\.weight, which PEFT leaves as it was"):
        lowdim.load_adapter(zoo.MODELS["llama-tied"].build(), tmp_path)


def test_a_pickle_is_read_as_tensors_only(tmp_path):
    tiny = zoo.MODELS["llama"]
    wrapped = written(tiny.build(), tmp_path, save={"safe_serialization": False}, target_modules=["q_proj"])
    assert (tmp_path / "adapter_model.bin").is_file()
    model = tiny.build()
    lowdim.load_adapter(model, tmp_path)
    assert relative_error(zoo.logits_of(model, tiny.batch()), zoo.logits_of(wrapped, tiny.batch())) < 1e-5

    class Evil:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",))

    torch.save({"x": Evil()}, tmp_path / "evil.bin")
    evil = (tmp_path / "evil.bin").read_bytes()
    for content in (evil, evil[:99], b"", b"rubbish" * 9):
        (tmp_path / "adapter_model.bin").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"adapter_model\.bin is damaged, or holds more than tensors"):
            lowdim.load_adapter(tiny.build(), tmp_path)
    torch.save([1], tmp_path / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="must hold tensors by name; got list"):
        lowdim.load_adapter(tiny.build(), tmp_path)
    assert not (tmp_path / "ran").exists()


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
        (
            lambda c, t: [t.update({k.replace("q_proj", "z_proj"): t.pop(k)}) for k in list(t)],
            r"adapts layer .*z_proj, which the model lacks \(nearest: .*_proj",
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
    assert adapters["two"].export(tmp_path / "cut", rank=1).folder.is_dir()

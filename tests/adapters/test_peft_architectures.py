"""PEFT loads what is exported and gives the same logits, for every architecture of a table, or the export is refused."""

import json

import pytest
import torch
from torch import nn

import lowdim
import zoo
from lowdim.adapters import LoRA, RandLoRA
from lowdim.testing.closeness import relative_error

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")


def trained(adapted, scale=0.05):
    """All trained numbers moved, those of heads and embeddings as well."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in adapted.trainable().values():
            parameter.add_((scale * torch.randn(parameter.shape, generator=generator)).to(parameter))
    return adapted


def check(tiny, method, kept, folder, **options):
    """PEFT's logits are those of the trained model, which are no longer the base model's."""
    model, batch = tiny.build(), tiny.batch()
    before = zoo.logits_of(model, batch)
    adapted = trained(lowdim.adapt(model, method, modules_to_save=kept))
    report = adapted.export(folder, **options)
    want = zoo.logits_of(model, batch)
    assert relative_error(want, before) > 1e-4
    loaded = peft.PeftModel.from_pretrained(tiny.build(), folder).eval()
    assert relative_error(zoo.logits_of(loaded, batch), want) < 1e-5
    assert report.exact
    return json.loads((folder / "adapter_config.json").read_text())


@pytest.mark.parametrize("name", zoo.MODELS)
def test_every_layer(name, tmp_path):
    tiny = zoo.MODELS[name]
    config = check(tiny, LoRA(rank=2, target_modules=tiny.targets), [], tmp_path)
    assert (config["task_type"] is None) == ("auto_mapping" in config)


@pytest.mark.parametrize("name", [name for name, tiny in zoo.MODELS.items() if tiny.head])
def test_a_trained_head(name, tmp_path):
    tiny = zoo.MODELS[name]
    check(tiny, LoRA(rank=2, target_modules=tiny.beside_head or tiny.targets), [tiny.head], tmp_path)


@pytest.mark.parametrize("name", [name for name, tiny in zoo.MODELS.items() if tiny.head and not tiny.beside_head])
def test_an_adapted_head(name, tmp_path):
    tiny = zoo.MODELS[name]
    config = check(tiny, LoRA(rank=2, target_modules=[tiny.head]), [], tmp_path)
    assert config["modules_to_save"] is None


@pytest.mark.parametrize("name", [name for name, tiny in zoo.MODELS.items() if tiny.embedding])
@pytest.mark.parametrize("saved", [False, True], ids=["adapted", "saved"])
def test_embeddings(name, saved, tmp_path):
    tiny = zoo.MODELS[name]
    targets = tiny.targets if saved else [tiny.embedding]
    check(tiny, LoRA(rank=2, target_modules=targets), [tiny.embedding] if saved else [], tmp_path)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "t5", "bart"])
def test_a_head_that_may_share_its_weight(name, tmp_path):
    tiny = zoo.MODELS[name]
    check(tiny, LoRA(rank=2, target_modules=["lm_head"]), [], tmp_path / "adapted")
    saved = check(tiny, LoRA(rank=2), ["lm_head"], tmp_path / "saved")["modules_to_save"]
    assert "lm_head" in saved
    assert (len(saved) > 1) == (name != "llama")


@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
def test_one_end_is_adapted_and_the_other_saved(name, tmp_path):
    """PEFT keeps two copies of the weight, so the adapted end is written whole, with its update in it."""
    tiny = zoo.MODELS[name]
    beside = "c_fc" if name == "gpt2" else "up_proj"
    config = check(tiny, LoRA(rank=2, target_modules=["lm_head", beside]), [tiny.embedding], tmp_path)
    assert len(config["modules_to_save"]) == 2


def test_a_name_that_ends_alike(tmp_path):
    """`classifier` also means `pre_classifier` to PEFT, so that layer is written whole, adapted or not."""
    tiny = zoo.MODELS["distilbert-classifier"]
    for targets in (["q_lin"], None):
        config = check(tiny, LoRA(rank=2, target_modules=targets), ["classifier"], tmp_path / str(targets))
        assert sorted(config["modules_to_save"]) == ["classifier", "pre_classifier"]
        assert config["task_type"] == "SEQ_CLS"


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("llama", "CAUSAL_LM"),
        ("gpt2", "CAUSAL_LM"),
        ("bert-classifier", "SEQ_CLS"),
        ("llama-classifier", "SEQ_CLS"),
        ("bert-tokens", "TOKEN_CLS"),
        ("bert-questions", "QUESTION_ANS"),
        ("t5", "SEQ_2_SEQ_LM"),
        ("bart", "SEQ_2_SEQ_LM"),
        ("whisper", None),
        ("wav2vec2-classifier", None),
        ("vit-classifier", None),
        ("bert-mlm", None),
    ],
)
def test_the_task(name, task, tmp_path):
    tiny = zoo.MODELS[name]
    adapted = lowdim.adapt(tiny.build(), LoRA(rank=2, target_modules=tiny.targets or tiny.beside_head))
    adapted.export(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["task_type"] == task
    if task is None:
        assert config["auto_mapping"]["base_model_class"] == tiny.model


def test_another_program_gets_no_head_that_nobody_trained(tmp_path):
    adapted = lowdim.adapt(zoo.MODELS["llama-classifier"].build(), LoRA(rank=2))
    adapted.export(tmp_path, target="vllm")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"]) == (None, None)


def test_sixteen_bits_say_what_a_layer_that_is_written_whole_loses(tmp_path):
    tiny = zoo.MODELS["distilbert-classifier"]
    adapted = trained(lowdim.adapt(tiny.build().bfloat16(), LoRA(rank=2), modules_to_save=["classifier"]), scale=0.01)
    report = adapted.export(tmp_path)
    assert not report.exact
    assert {name for name, error in report.errors.items() if error} == {"pre_classifier"}


def test_what_peft_does_not_load_is_refused_before_anything_is_written(tmp_path):
    adapted = lowdim.adapt(zoo.MODELS["mamba"].build(), LoRA(rank=2, target_modules=["in_proj", "out_proj"]))
    with pytest.raises(ValueError, match=r"PEFT cannot load this adapter \(ValueError: .*incompatible with Mamba"):
        adapted.export(tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Names(nn.Module):
    """Names that PEFT uses itself."""

    def __init__(self, names):
        super().__init__()
        torch.manual_seed(0)
        for name in names:
            self.add_module(name, nn.Linear(6, 6))
        self.inner = nn.Module()
        for name in names:
            self.inner.add_module(name, nn.Linear(6, 6))

    def forward(self, x):
        for part in (self.inner, self):
            for layer in part.children():
                x = torch.tanh(layer(x)) if isinstance(layer, nn.Linear) or hasattr(layer, "update") else x
        for name, layer in self.named_children():
            if name != "inner":
                x = torch.tanh(layer(x))
        return x


NAMES = ["fc", "xfc", "lora_A", "lora_head", "default", "base_layer", "original_module", "modules_to_save", "model"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("where", ["", "inner."])
@pytest.mark.parametrize("saved", [False, True], ids=["adapted", "saved"])
def test_any_name_is_right_or_refused(name, where, saved, tmp_path):
    model, x = Names(NAMES), torch.randn(4, 6)
    place = where + name
    kept = [f"inner.{name}" if where else name] if saved else []
    # a name that is saved also means those that end in it
    targets = ["lora_A" if name in ("fc", "xfc") else "xfc"] if saved else place.replace(".", r"\.")
    if saved and name == "lora_A":
        targets = ["fc"]
    adapted = trained(lowdim.adapt(model, LoRA(rank=2, target_modules=targets), modules_to_save=kept))
    want = model(x)
    try:
        report = adapted.export(tmp_path)
    except ValueError as error:
        assert "merge() " in str(error)  # noqa: PT017
        return
    loaded = peft.PeftModel.from_pretrained(Names(NAMES), tmp_path)
    assert relative_error(loaded(x), want) < 1e-5
    assert report.exact


def test_a_method_of_pefts_own_beside_a_saved_name_that_ends_alike(tmp_path):
    tiny = zoo.MODELS["distilbert-classifier"]
    check(tiny, RandLoRA(rank=2, target_modules=["q_lin", "pre_classifier"]), ["classifier"], tmp_path)


def test_numbers_that_are_not_finite_are_not_written(tmp_path):
    adapted = trained(lowdim.adapt(zoo.MODELS["llama"].build(), LoRA(rank=2, target_modules=["q_proj"])))
    with torch.no_grad():
        next(iter(adapted.layers.values())).update.A[0, 0] = torch.inf
    with pytest.raises(
        ValueError, match=r"model\.layers\.0\.self_attn\.q_proj\.lora_A\.weight has entries that are NaN or inf"
    ):
        adapted.export(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_peft_the_folder_is_the_same(tmp_path, monkeypatch):
    from lowdim.adapters.core.files import peft_check

    adapted = trained(lowdim.adapt(zoo.MODELS["bert-classifier"].build(), LoRA(rank=2)))
    adapted.export(tmp_path / "checked")
    monkeypatch.setattr(peft_check.importlib.util, "find_spec", lambda name: None)
    adapted.export(tmp_path / "unchecked")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "checked" / name).read_bytes() == (tmp_path / "unchecked" / name).read_bytes()

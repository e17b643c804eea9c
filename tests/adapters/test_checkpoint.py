import json
import os

import pytest
import torch
from torch import nn

import lowdim
from lowdim.adapters import AdaptedLayer, LaMDA, LoRA, SVFit
from lowdim.adapters.core.files import layout
from lowdim.errors import CheckpointError
from lowdim.files import read_tensors, write_tensors
from lowdim.testing.closeness import relative_error
from lowdim.testing.small_model import sample_input, small_model


@pytest.fixture
def saved(tmp_path):
    model = small_model()
    adapted = lowdim.adapt(model, LoRA(rank=2), modules_to_save=["score"])
    with torch.no_grad():
        for parameter in adapted.trainable().values():
            parameter.normal_()
    assert adapted.save(tmp_path / "a") == tmp_path / "a"
    return adapted, tmp_path / "a"


def _rewrite(folder, change, tensors=None):
    """The files with a changed description, written as lowdim writes them."""
    path = folder / "adapter.safetensors"
    old, metadata = read_tensors(path)
    about = json.loads(metadata["lowdim"])
    change(about)
    about["digest"] = layout.digest_of(old, about)
    write_tensors(path, old if tensors is None else tensors, {"lowdim": json.dumps(about)})
    (folder / "adapter.json").write_text(json.dumps(about))


def test_two_files_that_say_what_they_are(saved):
    _, folder = saved
    assert sorted(os.listdir(folder)) == ["adapter.json", "adapter.safetensors"]
    about = json.loads((folder / "adapter.json").read_text())
    assert about["format"] == "lowdim-adapter"
    assert about["method"] == "LoRA"
    assert about["config"]["rank"] == 2
    assert about["lowdim"] == lowdim.__version__
    assert about["modules_to_save"] == ["score"]
    assert about["layers"]["body.first"]["shape"] == [12, 8]
    assert about["base_model"] == {"class": "_Small", "name_or_path": None}


def test_heads_come_back_and_train(saved):
    adapted, folder = saved
    model = small_model()
    loaded = lowdim.load_adapter(model, folder)
    assert torch.equal(model(sample_input()), adapted.model(sample_input()))
    assert set(loaded.trainable()) == set(adapted.trainable())
    assert model.score.weight.requires_grad
    assert not model.body["first"].base.weight.requires_grad
    assert loaded.seed == adapted.seed
    assert loaded.fingerprints == adapted.fingerprints


def test_saving_again_replaces_the_whole(saved):
    adapted, folder = saved
    with torch.no_grad():
        adapted.model.score.weight.zero_()
    adapted.save(folder)
    model = small_model()
    lowdim.load_adapter(model, folder)
    assert not model.score.weight.any()


def test_a_full_disk_leaves_the_old_adapter(saved, monkeypatch):
    adapted, folder = saved
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with torch.no_grad():
        adapted.model.score.weight.zero_()

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(layout, "write_tensors", fail)
    with pytest.raises(OSError, match=r"No space left on device.*nothing was changed"):
        adapted.save(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    model = small_model()
    lowdim.load_adapter(model, folder)
    assert model.score.weight.any()


def test_two_files_of_different_saves_are_noticed(saved):
    adapted, folder = saved
    old = (folder / "adapter.safetensors").read_bytes()
    with torch.no_grad():
        adapted.model.score.weight.zero_()
    adapted.save(folder)
    (folder / "adapter.safetensors").write_bytes(old)  # as if killed between the two renames
    with pytest.raises(CheckpointError, match=r"does not belong to adapter\.safetensors"):
        lowdim.load_adapter(small_model(), folder)
    (folder / "adapter.json").unlink()
    model = small_model()
    lowdim.load_adapter(model, folder)  # the old tensors, complete
    assert model.score.weight.any()


def test_flipped_bits_are_noticed(saved):
    _, folder = saved
    path = folder / "adapter.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match="do not match its digest"):
        lowdim.load_adapter(small_model(), folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda about: about.update(version=3), "format version 3; this lowdim reads up to 2"),
        (lambda about: about.update(version="1"), "is not a lowdim adapter"),
        (lambda about: about.update(format="other"), "is not a lowdim adapter"),
        (lambda about: about.update(method="LoRB"), "no method 'LoRB' is registered .nearest: LoRA"),
        (lambda about: about["config"].update(rank=0), "the configuration of LoRA is not valid: rank"),
        (lambda about: about["config"].update(colour=1), "no field colour"),
        (lambda about: about.pop("layers"), "its description lacks layers"),
        (
            lambda about: about["layers"].update({"body.third": about["layers"]["body.first"]}),
            r"adapts layer body\.third, which the model lacks",
        ),
        (lambda about: about.update(layers=[]), r"layers of its description: Input should be a valid dictionary"),
        (
            lambda about: about["layers"]["body.first"].pop("shape"),
            r"layers\.body\.first\.shape of its description: Field required",
        ),
        (
            lambda about: about["layers"]["body.first"].pop("meta"),
            r"layers\.body\.first\.meta of its description: Field required",
        ),
        (lambda about: about["layers"]["body.first"].pop("fingerprint"), r"body\.first\.fingerprint of its description"),
        (lambda about: about["layers"]["body.first"].update(shape=["a", 8]), r"body\.first\.shape\.0 of its description"),
        (lambda about: about["layers"]["body.first"].update(fingerprint=7), r"body\.first\.fingerprint of its description"),
        (lambda about: about.update(method=7), "method of its description: Input should be a valid string"),
        (lambda about: about.update(seed="0"), "seed of its description: Input should be a valid integer"),
        (lambda about: about.update(modules_to_save=[1]), r"modules_to_save\.0 of its description"),
        (lambda about: about.update(version=0), "versions begin with 1"),
        (lambda about: about["config"].update(alpha=10**400), "the configuration of LoRA is not valid"),
        (lambda about: about["config"].update(alpha=[1]), "the configuration of LoRA is not valid"),
        (lambda about: about["config"].update(target_modules=7, rank={}), "the configuration of LoRA is not valid"),
        (lambda about: about["layers"]["body.first"].update(shape=[9, 9]), r"of shape \(9, 9\); the model's is \(12, 8\)"),
        (lambda about: about["config"].update(rank=3), r"layer body\.first: LoRAUpdate does not fit the file: A"),
        (lambda about: about.update(modules_to_save=["tail"]), "holds module tail, which the model lacks"),
    ],
)
def test_descriptions_that_do_not_fit(saved, change, message):
    _, folder = saved
    _rewrite(folder, change)
    model = small_model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        lowdim.load_adapter(model, folder)
    assert not any(isinstance(m, AdaptedLayer) for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_head_of_another_size_is_refused(saved):
    _, folder = saved
    model = small_model()
    model.score = nn.Linear(6, 5)
    with pytest.raises(CheckpointError, match=r"score\.bias has shape \(3,\) in the file and \(5,\) in the model"):
        lowdim.load_adapter(model, folder)
    assert not isinstance(model.body["first"], AdaptedLayer)


def test_foreign_folders(tmp_path, saved):
    with pytest.raises(CheckpointError, match="does not exist"):
        lowdim.load_adapter(small_model(), tmp_path / "none")
    write_tensors(tmp_path / "b/adapter.safetensors", {"x": torch.ones(1)})
    with pytest.raises(CheckpointError, match="was not written by lowdim"):
        lowdim.load_adapter(small_model(), tmp_path / "b")
    saved[0].export(tmp_path / "peft")
    model = small_model()
    lowdim.load_adapter(model, tmp_path / "peft")
    assert relative_error(model(sample_input()), saved[0].model(sample_input())) < 1e-5


def test_loading_into_an_adapted_or_another_model(saved):
    adapted, folder = saved
    x, plain, once = sample_input(), small_model()(sample_input()), adapted.model(sample_input())
    lowdim.load_adapter(adapted.model, folder)  # beside the first: a second time the same change, before the tanh
    first = adapted.model.body["first"]
    assert relative_error(first(x), 2 * first.base(x) - first.plain(x)) < 1e-5
    assert not torch.allclose(adapted.model(x), once)
    assert not torch.allclose(once, plain)
    with pytest.raises(CheckpointError, match=r"body\.first, which the model lacks"):
        lowdim.load_adapter(nn.Sequential(nn.Linear(8, 12)), folder)


def test_a_float32_base_takes_an_adapter_of_its_bfloat16_self(tmp_path):
    half = small_model(dtype=torch.bfloat16)
    adapted = lowdim.adapt(half, LoRA(rank=1), dtype=torch.float32)
    with torch.no_grad():
        for parameter in adapted.trainable().values():
            parameter.normal_()
    adapted.save(tmp_path)
    whole = small_model(dtype=torch.bfloat16).float()
    loaded = lowdim.load_adapter(whole, tmp_path)
    assert loaded.layers["body.first"].update.A.dtype == torch.float32
    assert relative_error(whole(sample_input()), half(sample_input(dtype=torch.bfloat16))) < 3e-2


@pytest.mark.parametrize("method", [LaMDA(rank=2), SVFit(rank=3)])
def test_residuals_are_recomputed_from_the_base_model(tmp_path, method):
    adapted = lowdim.adapt(small_model(), method)
    adapted.save(tmp_path)
    tensors, _ = read_tensors(tmp_path / "adapter.safetensors")
    assert not any(key.endswith(("C0", "base.weight")) for key in tensors)
    model = small_model()
    loaded = lowdim.load_adapter(model, tmp_path)
    for name, layer in loaded.layers.items():
        assert torch.equal(layer.base.weight, adapted.layers[name].base.weight)
        assert torch.equal(layer.delta(), adapted.layers[name].delta())


def test_every_flipped_bit_of_the_description_is_noticed(saved):
    adapted, folder = saved
    path = folder / "adapter.safetensors"
    data = path.read_bytes()
    start = data.index(b"config")
    right = adapted.model(sample_input())
    for place in range(start, start + 120):
        for bit in range(8):
            changed = bytearray(data)
            changed[place] ^= 1 << bit
            path.write_bytes(bytes(changed))
            try:
                model = small_model()
                lowdim.load_adapter(model, folder)
            except CheckpointError as error:
                assert "adapter.safetensors" in str(error) or "adapter.json" in str(error)  # noqa: PT017
            else:
                assert torch.equal(model(sample_input()), right)


def test_a_changed_word_in_the_description_for_people_is_noticed(saved):
    _, folder = saved
    text = (folder / "adapter.json").read_text()
    assert '"alpha": 16' in text
    (folder / "adapter.json").write_text(text.replace('"alpha": 16', '"alpha": 17'))
    with pytest.raises(CheckpointError, match=r"adapter\.json does not belong .* remove it to load the tensors as they are"):
        lowdim.load_adapter(small_model(), folder)


def test_a_file_of_version_1_loads(saved):
    """Its digest was of the tensors alone, and its fingerprints were digests alone."""
    adapted, folder = saved
    path = folder / "adapter.safetensors"
    tensors, metadata = read_tensors(path)
    about = json.loads(metadata["lowdim"])
    about.update(version=1, digest=layout.digest_of(tensors))
    for entry in about["layers"].values():
        entry["fingerprint"] = entry["fingerprint"].split(":")[0]
    write_tensors(path, tensors, {"lowdim": json.dumps(about)})
    (folder / "adapter.json").write_text(json.dumps(about))
    model = small_model()
    lowdim.load_adapter(model, folder)
    assert torch.equal(model(sample_input()), adapted.model(sample_input()))
    with pytest.raises(CheckpointError, match=r"the weight of layer body\.first differs \(check_base"):
        lowdim.load_adapter(small_model(seed=1), folder)
    with pytest.raises(CheckpointError, match=r"it is float16 here: try the model in float32 or bfloat16"):
        lowdim.load_adapter(small_model(seed=1).half(), folder)


# Names


def parts(**children):
    """A module with children of any name; nn.ModuleDict has no `update`."""
    made = nn.Module()
    for name, child in children.items():
        made.add_module(name, child)
    return made


class Deep(nn.Module):
    """Modules of the user's with the names that lowdim uses itself."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.base = parts(update=parts(base=nn.Linear(8, 8)), lora_A=nn.Linear(8, 8))
        self.update = parts(
            update=parts(update=parts(A=nn.Linear(8, 8), update=nn.Linear(8, 8))), original_module=nn.Linear(8, 8)
        )
        self.lowdim_shared = parts(steps=nn.Linear(8, 8))
        self.shared = nn.Linear(8, 2)

    def forward(self, x):
        x = torch.tanh(self.base.lora_A(torch.tanh(self.base.update.base(x))))
        x = self.update.original_module(x)
        for layer in self.update.update.update.children():
            x = torch.tanh(layer(x))
        return self.shared(self.lowdim_shared.steps(x))


@pytest.mark.parametrize("method", [LoRA(rank=2, target_modules=["base", "lora_A"]), LaMDA(rank=2, target_modules=["base"])])
@pytest.mark.parametrize(
    "kept", [["update.update"], ["original_module"], ["lowdim_shared", "shared"], ["update.update.update.update"]]
)
def test_any_name_of_a_module_survives(method, kept, tmp_path):
    adapted = lowdim.adapt(Deep(), method, modules_to_save=kept)
    with torch.no_grad():
        for parameter in adapted.trainable().values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    adapted.step()
    adapted.save(tmp_path)
    twin, x = Deep(), torch.randn(3, 8)
    loaded = lowdim.load_adapter(twin, tmp_path)
    assert torch.equal(twin(x), adapted.model(x))
    assert not torch.equal(twin(x), Deep()(x))
    other = lowdim.adapt(Deep(), method, modules_to_save=kept)
    other.load_state_dict(adapted.state_dict())
    assert torch.equal(other.model(x), adapted.model(x))
    assert {key: value.tolist() for key, value in loaded.state_dict().items()} == {
        key: value.tolist() for key, value in adapted.state_dict().items()
    }


def test_a_module_whose_state_is_no_tensor_is_refused(tmp_path):
    class Odd(nn.Linear):
        def get_extra_state(self):
            return {"scale": 2}

        def set_extra_state(self, state):
            pass

    model = nn.Sequential(nn.Linear(4, 4), Odd(4, 4))
    adapted = lowdim.adapt(model, LoRA(rank=1, target_modules=["0"]), modules_to_save=["1"])
    with pytest.raises(ValueError, match="module 1 cannot be saved whole: _extra_state of its state is a dict"):
        adapted.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_trained_beside_the_adapter_and_not_saved_is_said(tmp_path):
    model = small_model()
    adapted = lowdim.adapt(model, LoRA(rank=1))
    adapted.save(tmp_path / "quiet")
    model.score.weight.requires_grad_(True)
    for write in (adapted.save, adapted.export):
        with pytest.warns(UserWarning, match=r"^score\.weight can be trained and will not be saved .* modules_to_save"):
            write(tmp_path / "loud")


# The base model's dtype


FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("origin", FLOATS[:3], ids=str)
@pytest.mark.parametrize("trained", FLOATS, ids=str)
@pytest.mark.parametrize("loaded", FLOATS, ids=str)
def test_the_base_model_in_any_dtype(origin, trained, loaded, tmp_path):
    """A checkpoint in `origin`, loaded as `trained` for the training and as `loaded` afterwards."""
    torch.manual_seed(3)
    weights = (torch.randn(64, 48) * 0.02).to(origin)
    weights[0, :8] *= 1e-4  # subnormal in float16

    def base(dtype, change=0.0):
        layer = nn.Linear(48, 64)
        layer.weight = nn.Parameter((weights.float() * (1 + change)).to(origin).to(dtype))
        return nn.Sequential(layer)

    lowdim.adapt(base(trained), LoRA(rank=1)).save(tmp_path)
    lowdim.load_adapter(base(loaded), tmp_path)
    for change in (0.05, -0.02):
        with pytest.raises(CheckpointError, match="the weight of layer 0 differs"):
            lowdim.load_adapter(base(loaded, change), tmp_path)


# PEFT


class Named(nn.Module):
    """Names that end alike: what PEFT takes for patterns must not spread."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(6, 6)
        self.inner = nn.ModuleDict({"fc": nn.Linear(6, 6), "xfc": nn.Linear(6, 6)})

    def forward(self, x):
        return self.inner["xfc"](torch.tanh(self.inner["fc"](torch.tanh(self.fc(x)))))


def test_peft_adapts_the_same_layers_and_no_others(tmp_path):
    peft = pytest.importorskip("peft")
    model = Named()
    adapted = lowdim.adapt(model, LoRA(rank=2, target_modules="fc|inner.xfc"))  # "fc" in a list would mean inner.fc too
    assert list(adapted.layers) == ["fc", "inner.xfc"]
    with torch.no_grad():
        for layer in adapted.layers.values():
            layer.update.B.normal_()
    adapted.export(tmp_path)
    loaded = peft.PeftModel.from_pretrained(Named(), tmp_path)
    x = torch.randn(4, 6)
    assert relative_error(loaded(x), model(x)) < 1e-5
    names = {name for name, module in loaded.base_model.model.named_modules() if hasattr(module, "lora_A")}
    assert names == {"fc", "inner.xfc"}


def test_peft_takes_a_rank_for_each_layer_and_a_head(tmp_path):
    peft = pytest.importorskip("peft")
    model = small_model()
    adapted = lowdim.adapt(model, LaMDA(rank=2, rank_choices=(1, 4)), modules_to_save=["score"])
    with torch.no_grad():
        for parameter in adapted.trainable().values():
            parameter.add_(0.3 * torch.randn_like(parameter))
    report = adapted.export(tmp_path)
    assert sorted(report.ranks.values()) == [1, 4]
    loaded = peft.PeftModel.from_pretrained(small_model(), tmp_path)
    assert relative_error(loaded(sample_input()), model(sample_input())) < 1e-5


def test_a_rank_for_one_layer_does_not_spread_to_names_with_the_same_ending(tmp_path):
    peft = pytest.importorskip("peft")
    model = Named()
    adapted = lowdim.adapt(model, LoRA(rank=2))
    odd = LoRA(rank=3).attach(adapted.layers["fc"].base)
    model.fc = adapted.layers["fc"] = odd
    with torch.no_grad():
        for layer in adapted.layers.values():
            layer.update.B.normal_()
    assert adapted.export(tmp_path).ranks == {"fc": 3, "inner.fc": 2, "inner.xfc": 2}
    loaded = peft.PeftModel.from_pretrained(Named(), tmp_path)
    x = torch.randn(4, 6)
    assert relative_error(loaded(x), model(x)) < 1e-5


def test_peft_convolutions_and_embeddings(tmp_path):
    peft = pytest.importorskip("peft")

    def build():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Embedding(9, 16),
            nn.Unflatten(2, (4, 4)),
            nn.Conv2d(4, 6, 3, padding=1, stride=2),
            nn.Conv2d(6, 4, 3, padding=1, groups=2),
            nn.Conv2d(4, 5, 1),
        )

    model = build()
    adapted = lowdim.adapt(model, LoRA(rank=2, target_modules=["0", "2", "3", "4"]))
    with torch.no_grad():
        for layer in adapted.layers.values():
            layer.update.B.normal_()
    report = adapted.export(tmp_path)
    assert report.exact
    assert report.ranks == {"0": 2, "2": 2, "3": 4, "4": 2}  # PEFT needs the factors once for each group
    with pytest.warns(UserWarning, match="groups"):
        loaded = peft.PeftModel.from_pretrained(build(), tmp_path)
    x = torch.arange(4).view(1, 4)
    assert relative_error(loaded(x), model(x)) < 1e-5


@pytest.mark.parametrize("options", [{"dilation": 2}, {"padding": 1, "padding_mode": "circular"}])
def test_convolutions_that_peft_would_get_wrong_are_refused(tmp_path, options):
    adapted = lowdim.adapt(nn.Sequential(nn.Conv2d(2, 4, 3, **options)), LoRA(rank=1))
    with pytest.raises(ValueError, match="merge"):
        adapted.export(tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_export_refuses(tmp_path, saved):
    adapted, _ = saved
    with pytest.raises(ValueError, match="rank"):
        adapted.export(tmp_path, rank=0)
    with pytest.raises(ValueError, match=r"format must be one of peft; got 'gguf'"):
        adapted.export(tmp_path, format="gguf")
    adapted.merge()
    with pytest.raises(ValueError, match="merged"):
        adapted.export(tmp_path)

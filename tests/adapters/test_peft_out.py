"""PEFT adapts the layers that were exported and no others, and what it would get wrong is not exported."""

import pytest
import torch
from torch import nn

import lowdim
from lowdim.adapters import LaMDA, LoRA
from lowdim.testing.closeness import relative_error
from lowdim.testing.small_model import sample_input, small_model


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

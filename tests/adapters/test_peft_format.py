"""What a PEFT folder holds for updates of every shape, and for the programs that read it more strictly than PEFT."""

import json
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lowdim
import tiny
from lowdim.adapters import LoRA, Method, RandLoRA, ThinUpdate, WeightUpdate, to_peft
from lowdim.adapters.core.files.peft_factors import cut
from lowdim.adapters.core.files.peft_targets import VLLM_RANKS
from lowdim.errors import UnknownNameError
from lowdim.linalg import stream, wide
from lowdim.testing.closeness import relative_error
from lowdim.testing.small_model import small_model


class Rebased(ThinUpdate):
    """`B A` from a start `B0 A` that was taken out of the weight, both factors trained: rank 2r against the weight."""

    def __init__(self, out, n, rank, dtype, device):
        super().__init__(out, n, rank)
        self.A = nn.Parameter(torch.empty(rank, n, dtype=dtype, device=device))
        self.B = nn.Parameter(torch.empty(out, rank, dtype=dtype, device=device))
        for name in ("A0", "B0"):
            self.register_buffer(name, torch.empty_like(getattr(self, name[0])))

    def down(self):
        return self.A

    def up(self):
        return self.B

    def start(self):
        return wide(self.B0) @ wide(self.A0)

    def rebase(self, weight):
        return weight - self.start().to(weight)

    @torch.no_grad()
    def low_rank_delta(self):
        return torch.cat([wide(self.A), wide(self.A0)]), torch.cat([wide(self.B), -wide(self.B0)], dim=1)


class Dense(WeightUpdate):
    """Any matrix, with nothing known about it."""

    def __init__(self, matrix):
        super().__init__(*matrix.shape)
        self.matrix = nn.Parameter(matrix)

    def forward(self, x):
        return x @ self.matrix.T

    def dense(self):
        return self.matrix


@dataclass(frozen=True)
class ForTests(Method):
    rank: int = 2
    dropout: float = 0.0
    target_modules: Any = None
    spectrum: Any = None

    def blank(self, out_features, in_features, *, stats, dtype, device):
        if self.spectrum is not None:
            return Dense(torch.empty(out_features, in_features, dtype=dtype, device=device))
        return Rebased(out_features, in_features, self.rank, dtype, device)

    def initialise(self, update, weight, stats, generator):
        if self.spectrum is not None:
            update.matrix.copy_(matrix(self.spectrum, *weight.shape))
            return
        for name in ("A", "B", "A0", "B0"):
            getattr(update, name).normal_(generator=generator)


def matrix(spectrum, out, n):
    """A matrix with these singular values."""
    generator = stream(0, out, n)
    u, v = (torch.linalg.qr(torch.randn(size, len(spectrum), generator=generator)).Q for size in (out, n))
    return (u * torch.tensor(spectrum)) @ v.T


def llama(**sizes):
    torch.manual_seed(0)
    model = tiny.llama(2, **{"tie_word_embeddings": False, **sizes})
    model.config._name_or_path = "someone/llama"
    return model


def trained(model, method, **options):
    adapted = lowdim.adapt(model, method, **options)
    generator = stream(0, "trained")
    with torch.no_grad():
        for p in adapted.trainable().values():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return adapted


def strict_deltas(folder, adapted, scale_of_rank):
    """`ΔW` of each layer as a program reads it that knows one alpha and no patterns."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    found = {}
    for name in adapted.layers:
        A = tensors.pop(f"base_model.model.{name}.lora_A.weight")
        B = tensors.pop(f"base_model.model.{name}.lora_B.weight")
        found[name] = config["lora_alpha"] / (config["r"] if scale_of_rank == "config" else B.shape[1]) * B @ A
    assert not tensors, "nothing but LoRA tensors"
    return found


# --- exact factors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [2, 3, 4, 6])
def test_a_rebased_update_is_exact_against_the_weight_that_users_have(rank, tmp_path):
    peft = pytest.importorskip("peft")
    model = small_model()  # layers of (12, 8) and (6, 12): 2·rank exceeds the second's rank from 4 on, the first's at 6
    adapted = trained(model, ForTests(rank))
    report = adapted.export(tmp_path)
    assert report.exact
    assert report.ranks == {"body.first": min(2 * rank, 8), "body.second": min(2 * rank, 6)}
    x = torch.randn(20, 8)
    assert relative_error(peft.PeftModel.from_pretrained(small_model(), tmp_path)(x), model(x)) < 1e-5


def test_no_dense_decomposition_where_factors_exist(monkeypatch):
    layer = ForTests(rank=5).attach(nn.Linear(12, 6), generator=stream(0, "x"))
    monkeypatch.setattr(Rebased, "dense", lambda self: pytest.fail("built the matrix"))
    found = cut(layer)
    assert found.A.shape == (6, 12)
    A, B = layer.update.low_rank_delta()
    assert relative_error(found.B @ found.A, B @ A) < 1e-6


def test_an_update_of_rank_zero_and_one_of_strength_a_half(tmp_path):
    adapted = lowdim.adapt(small_model(), LoRA(rank=2))  # B = 0
    report = adapted.export(tmp_path, max_error=0.5)
    assert report.ranks == {"body.first": 1, "body.second": 1}
    assert report.exact
    adapted = trained(small_model(), LoRA(rank=2))
    for layer in adapted.layers.values():
        layer.strength = 0.5
    adapted.export(tmp_path)
    for name, delta in strict_deltas(tmp_path, adapted, "config").items():
        assert relative_error(delta, adapted.layers[name].delta()) < 1e-6
        assert relative_error(delta, 0.5 * adapted.layers[name].update.delta()) < 1e-6


# --- truncation -----------------------------------------------------------------------------------------------------------


def error_of(layer, found):
    delta = layer.delta()
    return float((delta - found.B @ found.A).norm() / delta.norm())


@pytest.mark.parametrize("bound", [0.5, 0.1, 0.01, 0.0])
def test_an_error_chooses_the_fewest(bound):
    spectrum = [2.0**-i for i in range(10)]
    layer = ForTests(spectrum=tuple(spectrum)).attach(nn.Linear(14, 10))
    found = cut(layer, max_error=bound)
    assert found.error == pytest.approx(error_of(layer, found), abs=1e-6)
    assert found.error <= bound
    rank = len(found.A)
    tail = math.sqrt(sum(s * s for s in spectrum[rank - 1 :]) / sum(s * s for s in spectrum))
    assert rank == 1 or tail > bound, "one fewer would not do"
    assert found.enough == 7, "for 1 %"


def test_an_error_shortens_exact_factors_too():
    layer = ForTests(rank=3).attach(nn.Linear(12, 9), generator=stream(0, "x"))
    with torch.no_grad():
        update = layer.update
        update.A0.copy_(update.A + 1e-4 * update.A0)  # the start's rows lie almost in the span of the trained ones
    found = cut(layer, max_error=0.01)
    assert len(found.A) == 3
    assert 0 < found.error <= 0.01
    assert found.error == pytest.approx(error_of(layer, found), rel=1e-2)
    assert cut(layer).error == 0.0
    assert len(cut(layer).A) == 6


def test_a_large_matrix_is_sketched():
    spectrum = [1.0] * 80 + [1e-3] * 20
    layer = ForTests(spectrum=tuple(spectrum)).attach(nn.Linear(1030, 1026))
    found = cut(layer, max_error=0.02)
    assert len(found.A) == 80, "found at the second doubling"
    assert found.error == pytest.approx(error_of(layer, found), rel=1e-2, abs=1e-4)
    assert found.error <= 0.02
    few = cut(layer, rank=40)
    assert few.error == pytest.approx(math.sqrt(0.5), rel=1e-2)
    assert few.enough is None
    assert len(cut(layer, max_error=0.0, limit=70).A) == 70


def test_the_suggested_rank_serves_every_layer(tmp_path):
    adapted = trained(small_model(), RandLoRA(rank=2))
    report = adapted.export(tmp_path, native=False)
    assert not report.exact
    assert report.ranks == {"body.first": 2, "body.second": 1}, "a quarter of the smaller side"
    again = adapted.export(tmp_path, rank=report.suggested_rank, native=False)
    assert max(again.errors.values()) <= 0.01
    fewer = adapted.export(tmp_path, rank=report.suggested_rank - 1, native=False)
    assert max(fewer.errors.values()) > 0.01
    assert adapted.export(tmp_path, max_error=0.01).ranks.keys() == report.ranks.keys()
    lora = adapted.export(tmp_path, rank=1)
    assert lora.ranks == {"body.first": 1, "body.second": 1}, "a LoRA, and not the method that PEFT has itself"
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_bad_numbers(tmp_path):
    adapted = trained(small_model(), LoRA(rank=2))
    for bad in (-0.1, 1.0, float("nan"), True):
        with pytest.raises(ValueError, match="max_error must be"):
            adapted.export(tmp_path / "out", max_error=bad)
    with pytest.raises(ValueError, match="rank or max_error, not both"):
        adapted.export(tmp_path / "out", max_error=0.1, rank=2)
    with pytest.raises(UnknownNameError, match=r"target must be one of vllm, llamacpp; got 'vlm'"):
        adapted.export(tmp_path / "out", target="vlm")
    assert not (tmp_path / "out").exists()


# --- for other programs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("target", "scale"), [("vllm", "config"), ("llamacpp", "tensor")])
def test_one_rank_for_all_layers_exactly(target, scale, tmp_path):
    peft = pytest.importorskip("peft")
    model = llama()
    adapted = trained(model, LoRA(rank=3, target_modules=["q_proj", "k_proj", "down_proj"]))
    for layer in list(adapted.layers.values())[:2]:
        nn.init.zeros_(layer.update.B)  # needs rank 1 only, and is padded
    plain = to_peft(adapted, tmp_path / "plain", max_error=0.0)
    assert set(plain.ranks.values()) == {1, 3}
    report = to_peft(adapted, tmp_path / "out", target=target, max_error=0.0)
    assert report.exact
    assert set(report.ranks.values()) == {3}
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({}, {})
    assert (config["bias"], config["modules_to_save"], config["use_dora"]) == ("none", None, False)
    assert config["peft_type"] == "LORA"
    assert config["base_model_name_or_path"] == "someone/llama"
    for name, delta in strict_deltas(tmp_path / "out", adapted, scale).items():
        assert torch.allclose(delta, adapted.layers[name].delta(), atol=1e-6)
    ids = torch.arange(12).view(2, 6)
    loaded = peft.PeftModel.from_pretrained(llama(), tmp_path / "out").eval()
    assert relative_error(loaded(input_ids=ids).logits, model.eval()(input_ids=ids).logits) < 1e-5


def test_a_method_of_pefts_own_becomes_lora_with_its_error_stated(tmp_path):
    adapted = trained(llama(), RandLoRA(rank=4, target_modules=["q_proj"]))
    assert to_peft(adapted, tmp_path / "own").exact
    report = to_peft(adapted, tmp_path / "out", target="vllm")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert all(0 < error < 1 for error in report.errors.values())
    assert report.suggested_rank


def test_a_common_rank_is_used_and_not_only_filled_up(tmp_path):
    adapted = trained(small_model(), RandLoRA(rank=2))
    apart = to_peft(adapted, tmp_path / "apart", max_error=0.1)
    common = to_peft(adapted, tmp_path / "common", max_error=0.1, target="vllm")
    low, high = sorted(apart.ranks, key=lambda name: apart.ranks[name])
    assert apart.ranks[low] < apart.ranks[high]
    assert common.errors[high] == apart.errors[high]
    assert common.errors[low] < apart.errors[low]


@pytest.mark.parametrize(("rank", "need"), [(1, None), (16, None), (17, 32), (40, 64), (300, 320), (512, 512)])
def test_vllms_rank_limit(rank, need, tmp_path):
    model = nn.Sequential(nn.Linear(600, 600))
    report = to_peft(lowdim.adapt(model, LoRA(rank=rank)), tmp_path, target="vllm")
    command = report.notes[0]
    assert command.startswith("vllm serve BASE_MODEL --enable-lora")
    assert command.endswith(f"--lora-modules NAME={tmp_path.name}")
    assert (f"--max-lora-rank {need} " in command) == (need is not None)
    assert any("default limit 16" in note for note in report.notes) == (need is not None)
    assert need is None or need in VLLM_RANKS


def test_a_rank_that_vllm_does_not_load_is_cut_with_its_error(tmp_path):
    adapted = trained(nn.Sequential(nn.Linear(600, 600)), LoRA(rank=520))
    report = to_peft(adapted, tmp_path, target="vllm")
    assert report.ranks == {"0": 512}
    assert 0 < report.errors["0"] < 0.1
    assert to_peft(adapted, tmp_path).exact


@pytest.mark.parametrize("target", ["vllm", "llamacpp"])
def test_what_stands_against_it_is_listed_at_once_and_nothing_is_written(target, tmp_path):
    transformers = pytest.importorskip("transformers")

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.places = nn.Embedding(5, 4), nn.Embedding(6, 4)
            self.conv, self.old, self.score = nn.Conv2d(2, 3, 1), transformers.pytorch_utils.Conv1D(4, 4), nn.Linear(4, 2)

        def get_input_embeddings(self):
            return self.words

    names = ["words", "places", "conv", "old"]
    adapted = lowdim.adapt(Mixed(), LoRA(rank=1, target_modules=names), modules_to_save=["score"])
    program = {"vllm": "vLLM", "llamacpp": r"llama\.cpp"}[target]
    with pytest.raises(ValueError, match=rf"^{program} cannot load this adapter; merge it instead\.") as caught:
        to_peft(adapted, tmp_path / "out", target=target)
    message = str(caught.value)
    assert "modules that are trained and saved whole (score)" in message
    assert "does not support LoRA: conv" in message
    assert "does not support LoRA: places" in message
    assert "stored transposed" in message
    assert "words" not in message
    assert not (tmp_path / "out").exists()


def test_tied_words(tmp_path):
    for target in (["lm_head"], ["embed_tokens"]):
        tied = trained(llama(tie_word_embeddings=True), LoRA(rank=1, target_modules=target))
        with pytest.raises(ValueError, match=rf"llama\.cpp stores once: \S*{target[0]}$"):
            to_peft(tied, tmp_path / "out", target="llamacpp")
        loose = trained(llama(), LoRA(rank=1, target_modules=target))
        assert to_peft(loose, tmp_path / "loose", target="llamacpp").exact
        notes = to_peft(tied, tmp_path / "vllm", target="vllm").notes
        assert any(target[0] in note and "register embeddings" in note for note in notes)


def test_the_command_for_llama_cpp_names_the_base_model(tmp_path):
    def notes(base):
        adapted.model.config._name_or_path = base
        return to_peft(adapted, tmp_path / "my out", target="llamacpp").notes

    adapted = trained(llama(), LoRA(rank=1, target_modules=["q_proj"]))
    first, server, third = notes("someone/llama")
    assert first == "llama-cli --model BASE.gguf --lora 'my out/adapter.gguf'"
    assert server.startswith("llama-server --model BASE.gguf --lora ")
    assert "convert_hf_to_gguf.py" in third
    assert third.endswith("someone/llama")
    assert notes("")[2].endswith("BASE_MODEL")
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "small.gguf").touch()
    only = notes(str(tmp_path / "base"))
    assert [note.split()[2] for note in only] == [str(tmp_path / "base" / "small.gguf")] * 2

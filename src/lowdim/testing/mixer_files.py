"""A mixer in other dtypes, on other devices, copied, and in files."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowdim.files import read_tensors, write_tensors
from lowdim.testing.mixer_hooks import BATCH, LENGTH, MixerHooks
from lowdim.testing.new_process import run_in_new_process

__all__ = ["MixerFiles"]


class MixerFiles(MixerHooks):
    """The same output, up to rounding in another dtype, else bit by bit."""

    def test_bfloat16_is_near_the_exact_answer(self) -> None:
        """Outputs and gradients in bfloat16, whole and step by step."""
        mixer, x = self.make(dtype=torch.bfloat16), self.tokens(torch.bfloat16)
        exact = self.reference(copy.deepcopy(mixer).double(), x.double())
        y = mixer(x)
        assert y.dtype == torch.bfloat16
        self.close(y.double(), exact, torch.bfloat16)
        state, out = mixer.initial_state(BATCH), []
        for t in range(LENGTH):
            y_t, state = mixer.step(x[:, t], state)
            out.append(y_t)
        self.close(torch.stack(out, 1).double(), exact, torch.bfloat16)
        y.float().square().sum().backward()
        for name, p in mixer.named_parameters():
            if p.requires_grad:
                assert p.grad is not None, name
                assert p.grad.dtype == p.dtype, name
                assert bool(p.grad.isfinite().all()), name

    def test_autocast(self) -> None:
        """Near the answer without it; the parameters' gradients keep their dtype."""
        mixer, x = self.make(dtype=torch.float32), self.tokens(torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            y = mixer(x)
        self.close(y.float(), self.reference(mixer, x), torch.bfloat16)
        y.float().sum().backward()
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in mixer.parameters() if p.requires_grad)

    def test_strided_tokens(self) -> None:
        """Transposed and sliced inputs give the same output."""
        mixer, x = self.make(), self.tokens(length=2 * LENGTH)
        for view in (x[:, ::2], x.transpose(0, 1).contiguous().transpose(0, 1)):
            self.close(mixer(view), mixer(view.contiguous()), torch.float64)

    def test_meta_device(self) -> None:
        """Shapes without memory; filled later from a state dict."""
        mixer, filled = self.make(device="meta", dtype=torch.float32), self.make(dtype=torch.float32)
        assert all(p.is_meta for p in mixer.parameters())
        assert mixer(torch.empty(2, 5, self.features, device="meta")).shape == (2, 5, self.features)
        mixer.to_empty(device="cpu").load_state_dict(filled.state_dict())
        x = self.tokens(torch.float32)
        assert torch.equal(mixer(x), filled(x))

    def test_deepcopy_is_independent(self) -> None:
        """Equal at first, independent afterwards."""
        mixer, x = self.make(), self.tokens()
        other, y = copy.deepcopy(mixer), mixer(x)
        assert torch.equal(other(x), y)
        with torch.no_grad():
            next(other.parameters()).add_(1)
        assert torch.equal(mixer(x), y)

    def test_loads_in_another_process(self, tmp_path: Path) -> None:
        """The saved tensors and the constructor's arguments give the same output, bit by bit."""
        mixer, x = self.make(dtype=torch.float32), self.tokens(torch.float32)
        write_tensors(tmp_path / "mixer.safetensors", {**mixer.state_dict(), "_x": x})
        run_in_new_process(_answer, self.mixer_class, self.features, self.how, str(tmp_path))
        assert torch.equal(read_tensors(tmp_path / "answer.safetensors")[0]["y"], mixer(x).detach())

    def test_same_seed_same_numbers(self) -> None:
        """Bit by bit, whatever torch's own generator holds; another seed gives others."""
        one = self.make()
        torch.manual_seed(12345)
        two, three = self.make(), self.make(seed=1)
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
        assert not all(torch.equal(a, b) for a, b in zip(one.parameters(), three.parameters(), strict=True))


def _answer(mixer_class: type[nn.Module], features: int, how: dict[str, Any], folder: str) -> None:
    tensors, _ = read_tensors(Path(folder) / "mixer.safetensors")
    x = tensors.pop("_x").clone()  # memory of its own: products of some CPUs depend on how the operands are aligned
    mixer = mixer_class(features, **how)
    mixer.load_state_dict(tensors)
    write_tensors(Path(folder) / "answer.safetensors", {"y": mixer(x).detach()})

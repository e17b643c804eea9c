"""The base models under the golden files: tiny, in float64, with stored numbers, so that no random draw is repeated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

FILES = Path(__file__).parent / "files"


class Blocks(nn.Module):
    """Two residual blocks with the layer names of a transformer."""

    def __init__(self) -> None:
        super().__init__()
        shapes = {"q": (8, 8), "v": (8, 8), "up": (8, 12), "down": (12, 8)}
        self.stem = nn.Linear(6, 8)
        self.layer = nn.ModuleList(nn.ModuleDict({n: nn.Linear(*shape) for n, shape in shapes.items()}) for _ in range(2))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        for block in self.layer:
            h = h + torch.tanh(block["q"](h)) * torch.sigmoid(block["v"](h))
            h = h + block["down"](torch.tanh(block["up"](h)))
        return self.head(h)


class Three(nn.Module):
    """Three linear layers in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 12), nn.Linear(12, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Convolutions(nn.Module):
    """Two convolutions, a mean over all places and a head."""

    def __init__(self, dimensions: int) -> None:
        super().__init__()
        kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
        self.first, self.second = kind(3, 6, 2, padding=1), kind(6, 8, 2, stride=2)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))).flatten(2).mean(-1))


class Words(nn.Module):
    """An embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(11, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(x)).mean(1))


KINDS = {
    "blocks": (Blocks, lambda: torch.randn(10, 6)),
    "three": (Three, lambda: torch.randn(10, 6)),
    "conv1d": (lambda: Convolutions(1), lambda: torch.randn(6, 3, 7)),
    "conv2d": (lambda: Convolutions(2), lambda: torch.randn(6, 3, 5, 4)),
    "conv3d": (lambda: Convolutions(3), lambda: torch.randn(6, 3, 4, 3, 3)),
    "words": (Words, lambda: torch.randint(0, 11, (6, 5))),
}


def write(kind: str) -> None:
    """Draw a base and its batch, and store them."""
    make, inputs = KINDS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(len(kind))
        model, x = make(), inputs()
        target = torch.randn(len(x), 3)
    numbers = {**model.state_dict(), "x": x, "target": target}
    FILES.joinpath("bases").mkdir(parents=True, exist_ok=True)
    save_file(
        {n: t.double() if t.is_floating_point() else t for n, t in numbers.items()}, FILES / "bases" / f"{kind}.safetensors"
    )


def read(kind: str) -> tuple[Any, tuple[Tensor, Tensor]]:
    """A base in training mode and its batch `(x, target)`."""
    numbers = load_file(FILES / "bases" / f"{kind}.safetensors")
    batch = numbers.pop("x"), numbers.pop("target")
    model = KINDS[kind][0]().double()
    model.load_state_dict(numbers)
    return model, batch


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean squared error."""
    x, target = batch
    return (model(x) - target).square().mean()


def output(model: nn.Module, x: Tensor) -> Tensor:
    """What the model answers in evaluation mode; its mode is kept."""
    training = model.training
    with torch.no_grad():
        y = model.eval()(x)
    model.train(training)
    return y

"""Models of blocks with q and v, adapted by DiffoRA and moved away from its start, for the tests of DiffoRA."""

import torch
from torch import nn

import lowdim


class Blocks(nn.Module):
    """`h <- tanh(q(h)) + v(h)` for each block; a block may lack its v."""

    def __init__(self, weights, dtype=torch.float64):
        super().__init__()
        self.blocks = nn.ModuleList()
        for row in weights:
            block = nn.ModuleDict()
            for name, weight in row.items():
                block[name] = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=dtype)
                block[name].weight.data.copy_(weight)
            self.blocks.append(block)

    def forward(self, h):
        for block in self.blocks:
            h = torch.tanh(block["q"](h)) + (block["v"](h) if "v" in block else h)
        return h


def loss_fn(model, batch):
    x, y = batch
    return (model(x) - y).square().mean()


def blocks(rows=3, lacking=(), dim=5, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: 0.4 * torch.randn(dim, dim, generator=generator, dtype=torch.float64)  # noqa: E731
    return Blocks([{name: draw() for name in "qv" if (i, name) not in lacking} for i in range(rows)], dtype)


def batch(seed, dim=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(8, dim, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))


def moved(adapted, seed=0):
    """Away from B = 0 and from equal logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapted.weight_parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
        noise = torch.randn(adapted.dam.shape, generator=generator, dtype=torch.float64)
        adapted.dam.add_(noise)
    return adapted


def searched(method, lacking=(), rows=3, dtype=torch.float64):
    return moved(lowdim.adapt(blocks(rows, lacking, dtype=dtype), method))


Q_V = {"rank": 2, "alpha": 4, "target_modules": ["q", "v"]}

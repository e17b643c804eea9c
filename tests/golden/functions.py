"""Golden numbers of what trains no model: completion of a matrix, nested representations, diagnostics."""

from __future__ import annotations

from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from golden import bases
from lowdim import diagnose, represent, solve

FILE = bases.FILES / "functions.safetensors"


def _matrix(rows: int, columns: int, step: float) -> Tensor:
    """Numbers of full rank that no generator draws."""
    return torch.sin(torch.arange(rows * columns, dtype=torch.float64).square() * step).view(rows, columns)


def answers() -> dict[str, Tensor]:
    """All numbers, by the function that gives them."""
    return {**_completion(), **_representations(), **_diagnostics()}


def _completion() -> dict[str, Tensor]:
    M = _matrix(14, 2, 1.7) @ _matrix(2, 12, 0.9) + 0.05 * _matrix(14, 12, 2.3)
    rows, cols = torch.nonzero(_matrix(14, 12, 3.1) > -0.6, as_tuple=True)
    found = {}
    for inner in ("exact", "sketched"):
        result = solve.complete_matrix(rows, cols, M[rows, cols], (14, 12), 2, iters=4, inner=inner)
        found[f"complete_matrix.{inner}"] = result.U @ result.V.T
        found[f"complete_matrix.{inner}.errors"] = torch.tensor(result.errors, dtype=torch.float64)
    return found


def _representations() -> dict[str, Tensor]:
    x, labels = _matrix(9, 16, 0.7), torch.arange(9) % 3
    found = {}
    for shared in (False, True):
        head = represent.MatryoshkaHead(16, 3, dims=[2, 4, 16], efficient=shared).double()
        for index, (name, parameter) in enumerate(head.named_parameters()):
            parameter.data = _matrix(1, parameter.numel(), 0.3 + index).view(parameter.shape)
            found[f"MatryoshkaHead.{shared}.{name}"] = parameter.detach()  # its name in a file
        logits = head(x)
        found |= {f"MatryoshkaHead.{shared}.{size}": part.detach() for size, part in zip((2, 4, 16), logits, strict=True)}
        loss = represent.MatryoshkaCrossEntropy([1.0, 0.5, 2.0])(logits, labels)
        found[f"MatryoshkaCrossEntropy.{shared}"] = loss.detach()
    loss = represent.MatryoshkaEmbeddingLoss(lambda a, b: (a - b).square().mean(), [4, 16])
    found["MatryoshkaEmbeddingLoss"] = loss(x, x.flip(0))
    probabilities = torch.softmax(torch.stack([2 * _matrix(9, 3, 0.4), 4 * torch.nn.functional.one_hot(labels, 3)]), -1)
    result = represent.MatryoshkaCascade([2, 16]).fit(probabilities, labels).predict(probabilities)
    found |= {"MatryoshkaCascade.predictions": result.predictions, "MatryoshkaCascade.level": result.level}
    near = represent.adaptive_retrieve(x[:3], x, retrieval_dim=4, rerank_dim=16, shortlist=5, k=3)
    found |= {"adaptive_retrieve": near.indices, "adaptive_retrieve.distances": near.distances}
    near = represent.funnel_retrieve(x[:3], x, retrieval_dim=2, rerank_dims=[4, 16], shortlists=[6, 3])
    return {**found, "funnel_retrieve": near.indices, "funnel_retrieve.distances": near.distances}


def _diagnostics() -> dict[str, Tensor]:
    base, tuned = _matrix(8, 6, 0.7), _matrix(8, 6, 0.7) + 4 * _matrix(8, 1, 1.1) @ _matrix(1, 6, 0.5)
    A, B = diagnose.scale_intruders_lora(base, _matrix(2, 6, 0.5), _matrix(8, 2, 1.1), scaling=4.0, scale=0.5, threshold=0.9)
    bounds = [diagnose.compression_bound(0.14, d, 2000, bits=8) for d in (10, 40)]
    return {
        "scale_intruders": diagnose.scale_intruders(base, tuned, scale=0.5, k=3, threshold=0.7),
        "scale_intruders_lora": B @ A,
        "compression_bound": torch.tensor(bounds, dtype=torch.float64),
        "quantize_subspace": diagnose.quantize_subspace(_matrix(1, 20, 0.7)[0], 3),
    }


def write(name: str) -> None:
    """Store all."""
    found: dict[str, Any] = {key: value.contiguous().clone() for key, value in answers().items()}
    save_file(found, FILE)

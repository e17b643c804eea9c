import pytest
import torch

import vectors
from lowdim.represent import starbucks_retrieval_loss
from lowdim.testing.represent_case import RepresentCase


class _Loss(torch.nn.Module):
    """The function as a module: a parameter shifts the queries."""

    def __init__(self):
        super().__init__()
        self.shift = torch.nn.Parameter(torch.linspace(-1, 1, 8))

    def forward(self, query, passage):
        return starbucks_retrieval_loss(query + self.shift, passage, (2, 4, 8), temperature=0.7, kl_div_weight=0.3)


def states(dtype):
    g = torch.Generator().manual_seed(2)
    return torch.randn(3, 4, 8, generator=g).to(dtype), torch.randn(3, 8, 8, generator=g).to(dtype)


class TestRetrievalLoss(RepresentCase):
    def make(self):
        return _Loss()

    def loss(self, module, dtype):
        return module(*states(dtype))

    def expected(self, module):
        query, passage = states(torch.float64)
        query = query + module.shift
        scores = [query[i, :, :d] @ passage[i, :, :d].T / 0.7 for i, d in enumerate((2, 4, 8))]
        log_p = [(s - s.logsumexp(1, keepdim=True)) for s in scores]
        rows = torch.arange(4)
        total = -log_p[2][rows, 2 * rows].mean()  # two passages for each query, the first is its own
        teacher = log_p[2].detach()
        for student in log_p[:2]:
            total = total - student[rows, 2 * rows].mean() + 0.3 * (teacher.exp() * (teacher - student)).sum() / 4
        return total

    def refusals(self):
        q, p = states(torch.float32)
        return [
            (ValueError, "multiple of that of queries (4)", lambda: starbucks_retrieval_loss(q, p[:, :6], (2, 4, 8))),
            (ValueError, "same layers and width", lambda: starbucks_retrieval_loss(q, p[:2], (2, 4, 8))),
            (ValueError, "same layers and width", lambda: starbucks_retrieval_loss(q[0], p[0], (8,))),
            (ValueError, "the width of the embeddings (8)", lambda: starbucks_retrieval_loss(q, p, (2, 4, 9))),
            (ValueError, "each of the 3 layers", lambda: starbucks_retrieval_loss(q, p, (4, 8))),
            (ValueError, "temperature", lambda: starbucks_retrieval_loss(q, p, (2, 4, 8), temperature=0.0)),
            (TypeError, "integers", lambda: starbucks_retrieval_loss(q, p, (2, 4, 8.0))),  # type: ignore[arg-type]
        ]


def test_vectors():
    case = vectors.load("starbucks", "retrieval")
    query, passage = case["query"].requires_grad_(), case["passage"].requires_grad_()
    loss = starbucks_retrieval_loss(query, passage, **case.hyperparameters)
    case.close(loss, "loss")
    loss.backward()
    case.close(query.grad, "grad_query")
    case.close(passage.grad, "grad_passage")


def test_one_size_is_the_cross_entropy():
    q, p = (x[-1:] for x in states(torch.float64))
    want = torch.nn.functional.cross_entropy(q[0] @ p[0].T, 2 * torch.arange(4))
    assert starbucks_retrieval_loss(q, p, [8]).item() == pytest.approx(want.item(), rel=1e-12)

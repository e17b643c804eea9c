import pytest
import torch
from torch import nn
from torch.nn import functional as F

import vectors
from lowdim.represent import MatryoshkaCrossEntropy, MatryoshkaEmbeddingLoss, MatryoshkaHead
from lowdim.testing.represent_case import RepresentCase

DIMS = (4, 8, 16, 32)


def head(efficient=False, **kw):
    torch.manual_seed(3)
    return MatryoshkaHead(32, 7, DIMS, efficient=efficient, **kw)


def batch(dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    return torch.randn(9, 32, generator=g).to(dtype), torch.randint(7, (9,), generator=g)


class TestHead(RepresentCase):
    efficient = False

    def make(self):
        return head(self.efficient)

    def loss(self, module, dtype):
        x, y = batch(dtype)
        return MatryoshkaCrossEntropy([1.0, 0.5, 2.0, 1.0])(module(x), y)

    def expected(self, module):
        (x, y), total = batch(torch.float64), torch.zeros((), dtype=torch.float64)
        for g, (weight, size) in enumerate(zip((1.0, 0.5, 2.0, 1.0), (4, 8, 16, 32))):
            W = module.get_parameter(f"nesting_classifier_{0 if self.efficient else g}.weight")
            b = module.get_parameter(f"nesting_classifier_{0 if self.efficient else g}.bias")
            logits = x[:, :size] @ W[:, :size].T + b
            total = total + weight * (logits.logsumexp(1) - logits[torch.arange(9), y]).mean()
        return total

    def refusals(self):
        return [
            (ValueError, "none", lambda: MatryoshkaHead(8, 3, [])),
            (ValueError, "strictly increasing", lambda: MatryoshkaHead(8, 3, [4, 4])),
            (ValueError, "strictly increasing", lambda: MatryoshkaHead(8, 3, [8, 4])),
            (ValueError, "at least 1", lambda: MatryoshkaHead(8, 3, [0, 4])),
            (ValueError, "in_features (8)", lambda: MatryoshkaHead(8, 3, [4, 9])),
            (TypeError, "4.0", lambda: MatryoshkaHead(8, 3, [2, 4.0])),  # type: ignore[list-item]
            (TypeError, "True", lambda: MatryoshkaHead(8, 3, [True, 4])),
            (TypeError, "8", lambda: MatryoshkaHead(8, 3, 8)),  # type: ignore[arg-type]
            (ValueError, "num_classes", lambda: MatryoshkaHead(8, 0, [4])),
            (ValueError, "32 features", lambda: self.make()(torch.zeros(2, 31))),
        ]


class TestEfficientHead(TestHead):
    efficient = True


class TestEmbeddingLoss(RepresentCase):
    def make(self):
        torch.manual_seed(0)
        return MatryoshkaEmbeddingLoss(nn.MSELoss(), [2, 8], weights=[0.5, 3.0])

    def loss(self, module, dtype):
        x, _ = batch(dtype)
        return module(x[:, :16], x[:, 16:])

    def expected(self, module):
        u, v = batch(torch.float64)[0].split(16, dim=1)
        total = torch.zeros((), dtype=torch.float64)
        for weight, size in ((0.5, 2), (3.0, 8)):
            a, b = (z[:, :size] / z[:, :size].norm(dim=1, keepdim=True) for z in (u, v))
            total = total + weight * (a - b).square().mean()
        return total

    def refusals(self):
        return [
            (ValueError, "one number per size (2)", lambda: MatryoshkaEmbeddingLoss(F.mse_loss, [2, 4], [1.0])),
            (ValueError, "embedding (3)", lambda: MatryoshkaEmbeddingLoss(F.mse_loss, [2, 4])(*torch.zeros(2, 5, 3))),
            (TypeError, "callable", lambda: MatryoshkaEmbeddingLoss(0.5, [2, 4])),  # type: ignore[arg-type]
            (ValueError, "at least one tensor", lambda: MatryoshkaEmbeddingLoss(F.mse_loss, [2])()),
        ]


@pytest.mark.parametrize("name", ["head", "head_efficient"])
def test_vectors(name):
    case = vectors.load("mrl", name)
    h = case.hyperparameters
    module = MatryoshkaHead(h["in_features"], h["num_classes"], h["dims"], efficient=h["efficient"], dtype=torch.float64)
    module.load_state_dict({k[6:]: v for k, v in case.tensors.items() if k.startswith("state.")})  # the authors' names
    loss_fn = MatryoshkaCrossEntropy(h["weights"], label_smoothing=h["label_smoothing"])
    x = case["x"].requires_grad_()
    logits = module(x)
    for g, l in enumerate(logits):
        case.close(l, f"logits.{g}")
    loss = loss_fn(logits, case["target"])
    case.close(loss, "loss")
    loss.backward()
    case.close(x.grad, "grad_x")
    for key, p in module.named_parameters():
        case.close(p.grad, f"grad.{key}")
    sgd = torch.optim.SGD(module.parameters(), h["lr"])
    for _ in range(h["steps"]):
        sgd.zero_grad()
        loss_fn(module(case["x"].detach()), case["target"]).backward()
        sgd.step()
    for key, p in module.named_parameters():
        case.close(p, f"after3.{key}")


def test_initialisation_is_that_of_linear_layers_in_order():
    ours = head()
    torch.manual_seed(3)
    theirs = [nn.Linear(m, 7) for m in DIMS]
    for g, linear in enumerate(theirs):
        assert torch.equal(ours.get_parameter(f"nesting_classifier_{g}.weight"), linear.weight)
        assert torch.equal(ours.get_parameter(f"nesting_classifier_{g}.bias"), linear.bias)


@pytest.mark.parametrize("efficient", [False, True])
def test_a_head_neither_reads_nor_teaches_beyond_its_size(efficient):
    module, (x, _) = head(efficient), batch()
    want = module(x)[1]
    spoilt = x.clone()
    spoilt[:, 8:] = float("nan")
    assert torch.equal(module(spoilt)[1], want)
    x.requires_grad_()
    module(x)[1].sum().backward()
    assert x.grad is not None
    assert x.grad[:, :8].any()
    assert not x.grad[:, 8:].any()


@pytest.mark.parametrize("efficient", [False, True])
def test_leading_dimensions_dims_and_no_bias(efficient):
    module, (x, _) = head(efficient, bias=False), batch()
    assert module.dims == DIMS
    assert not any("bias" in name for name in module.state_dict())
    assert len(module.state_dict()) == (1 if efficient else 4)
    deep = module(x.view(3, 3, 32))
    assert all(torch.allclose(a.view(9, 7), b, atol=1e-6) for a, b in zip(deep, module(x)))


def test_efficient_head_is_the_cut_weight():
    module, (x, _) = head(True), batch()
    w, b = module.get_parameter("nesting_classifier_0.weight"), module.get_parameter("nesting_classifier_0.bias")
    for m, l in zip(DIMS, module(x)):
        assert torch.allclose(l, x[:, :m] @ w[:, :m].T + b, atol=1e-6)


def test_cost_counts_every_size():
    module = head()
    assert module.cost(10).flops_forward == 2 * 10 * 7 * sum(DIMS)
    assert module.cost(10).parameters == 7 * sum(DIMS) + 7 * 4


def test_weights_stay_double():
    logits = [torch.randn(5, 3, dtype=torch.float64) for _ in range(2)]
    y = torch.tensor([0, 1, 2, 0, 1])
    got = MatryoshkaCrossEntropy([0.1, 0.7])(logits, y)
    want = 0.1 * F.cross_entropy(logits[0], y) + 0.7 * F.cross_entropy(logits[1], y)
    assert abs(float(got - want)) < 1e-15  # float32 weights would be off by 1e-9


def test_cross_entropy_keywords_and_errors():
    logits, y = [torch.randn(4, 3) for _ in range(2)], torch.tensor([0, 1, 1, 2])
    kw = {"ignore_index": 2, "weight": torch.tensor([1.0, 2.0, 3.0]), "label_smoothing": 0.2}
    assert torch.allclose(MatryoshkaCrossEntropy(**kw)(logits, y), sum(F.cross_entropy(l, y, **kw) for l in logits))
    with pytest.raises(ValueError, match="2 logits"):
        MatryoshkaCrossEntropy([1.0])(logits, y)
    with pytest.raises(ValueError, match="at least one"):
        MatryoshkaCrossEntropy()([], y)
    with pytest.raises(TypeError):
        MatryoshkaCrossEntropy(smoothing=0.1)


def test_cross_entropy_is_float32_under_autocast():
    module, (x, y) = head(), batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = module(x)
        loss = MatryoshkaCrossEntropy()(logits, y)
    assert logits[0].dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    assert torch.allclose(loss, sum(F.cross_entropy(l.float(), y) for l in logits))


def test_embedding_loss_cuts_then_normalises():
    x, _ = batch(torch.float64)
    u, v = x[:, :16], x[:, 16:]
    got = MatryoshkaEmbeddingLoss(F.mse_loss, [3, 16], [0.1, 2.0])(u, v)
    parts = [F.mse_loss(*(t[:, :m] / t[:, :m].norm(dim=1, keepdim=True) for t in (u, v))) for m in (3, 16)]
    assert torch.allclose(got, 0.1 * parts[0] + 2.0 * parts[1], atol=1e-14)
    plain = MatryoshkaEmbeddingLoss(F.mse_loss, [3], normalize=False)(u, v)
    assert torch.equal(plain, F.mse_loss(u[:, :3], v[:, :3]))


def test_keywords_reach_the_loss():
    u, v = batch(torch.float64)[0].split(16, dim=1)
    y = torch.tensor([1.0, -1.0, 1.0] * 3, dtype=torch.float64)
    got = MatryoshkaEmbeddingLoss(F.cosine_embedding_loss, [3])(u, v, target=y)
    assert torch.allclose(got, F.cosine_embedding_loss(u[:, :3], v[:, :3], y))


def test_embedding_loss_keeps_zero_vectors_finite():
    u = torch.zeros(4, 8, requires_grad=True)
    loss = MatryoshkaEmbeddingLoss(lambda a, b: (a - b).square().sum(), [2, 8])(u, torch.zeros(4, 8))
    loss.backward()
    assert float(loss.detach()) == 0
    assert torch.isfinite(u.grad).all()


@pytest.mark.slow  # importing sentence-transformers takes most of the time
@pytest.mark.parametrize("weights", [None, [0.1, 1.0, 0.7]])
def test_equals_sentence_transformers_matryoshka_loss(weights):
    st = pytest.importorskip("sentence_transformers", reason="the peer's MatryoshkaLoss is compared only where it is installed")
    losses = st.sentence_transformer.losses

    class Encoder(nn.Module):  # a SentenceTransformer as far as its losses look
        def forward(self, features):
            return {"sentence_embedding": features["embedding"]}

        def get_embedding_dimension(self):
            return 16

    encoder, scale = Encoder(), 20.0
    theirs = losses.MatryoshkaLoss(encoder, losses.MultipleNegativesRankingLoss(encoder, scale=scale), [2, 8, 16], weights)

    def ranking(a, b):
        return F.cross_entropy(scale * F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T, torch.arange(len(a)))

    g = torch.Generator().manual_seed(5)
    pairs = [torch.randn(12, 16, generator=g).requires_grad_() for _ in range(2)]
    ours = MatryoshkaEmbeddingLoss(ranking, [2, 8, 16], weights)(*pairs)
    grads = torch.autograd.grad(ours, pairs)
    peer = theirs([{"embedding": p} for p in pairs], torch.zeros(12))
    assert abs((ours - peer).item()) <= 1e-6 * peer.item()
    for a, b in zip(grads, torch.autograd.grad(peer, pairs)):
        assert torch.allclose(a, b, atol=1e-6)

import math

import pytest
import torch

import vectors
from lowdim.represent import DSimplexClassifier, HOCLoss, StationaryLoss, simplex_vertices
from lowdim.testing.represent_case import RepresentCase


def batch(dtype, size=5, classes=4):
    g = torch.Generator().manual_seed(4)
    new, old = torch.randn(7, size, generator=g), torch.randn(7, size, generator=g)
    return new.to(dtype), old.to(dtype), torch.randint(classes, (7,), generator=g)


def by_loops(old, new, y, mu):
    """L_HOC of the paper: rows are old, columns new; entries of the same class count exp(0)."""
    total = torch.zeros((), dtype=torch.float64)
    for n in range(len(y)):
        s = [mu * (old[n] / old[n].norm()) @ (new[m] / new[m].norm()) for m in range(len(y))]
        terms = sum(torch.exp(s[m]) if y[m] != y[n] else torch.ones((), dtype=torch.float64) for m in range(len(y)))
        total = total - s[n] + torch.log(terms)
    return total / len(y)


class _Net(torch.nn.Module):
    """A layer that makes the features of the classifier and the losses."""

    def __init__(self, loss, classifier):
        super().__init__()
        torch.manual_seed(1)
        self.layer, self.loss, self.classifier = torch.nn.Linear(5, 5), loss, classifier


class TestHOCLoss(RepresentCase):
    def make(self):
        return _Net(HOCLoss(mu=3.0), None)

    def loss(self, module, dtype):
        x, old, y = batch(dtype)
        return module.loss(x + module.layer(x), old, y)

    def expected(self, module):
        x, old, y = batch(torch.float64)
        return by_loops(old, x + x @ module.layer.weight.T + module.layer.bias, y, 3.0)

    def refusals(self):
        x, old, y = batch(torch.float32)
        return [
            (ValueError, "same shape", lambda: HOCLoss()(x, old[:, :3], y)),
            (ValueError, "same shape", lambda: HOCLoss()(x[0], old[0], y)),
            (ValueError, "labels must have shape (7,)", lambda: HOCLoss()(x, old, y[:6])),
            (ValueError, "at least one row", lambda: HOCLoss()(x[:0], old[:0], y[:0])),
            (ValueError, "mu", lambda: HOCLoss(mu=0.0)),
        ]


class TestStationaryLoss(RepresentCase):
    def make(self):
        return _Net(StationaryLoss(mu=2.0, ce_weight=0.3), DSimplexClassifier(6))

    def loss(self, module, dtype):
        x, old, y = batch(dtype)
        new = module.layer(x)
        return module.loss(module.classifier(new), y, new, old)

    def expected(self, module):
        x, old, y = batch(torch.float64)
        new = x @ module.layer.weight.T + module.layer.bias
        logits = new @ module.classifier.weight.T
        entropy = (logits.logsumexp(1) - logits[range(7), y]).mean()
        return 0.3 * entropy + 0.7 * by_loops(old, new, y, 2.0)

    def refusals(self):
        x, old, y = batch(torch.float32)
        return [
            (ValueError, "ce_weight", lambda: StationaryLoss(ce_weight=1.1)),
            (ValueError, "got only new", lambda: StationaryLoss()(x, y, x)),
            (ValueError, "same shape", lambda: StationaryLoss()(x, y, x, old[:5])),
        ]


class TestClassifier(RepresentCase):
    def make(self):
        return _Net(torch.nn.CrossEntropyLoss(), DSimplexClassifier(6, reverse_labels=True, dtype=torch.float64))

    def loss(self, module, dtype):
        x, _, y = batch(dtype)
        logits = module.classifier(module.layer(x))
        return module.loss(logits if dtype == torch.float64 else logits.float(), module.classifier.targets(y))

    def expected(self, module):
        x, _, y = batch(torch.float64)
        gram = torch.full((6, 6), -1 / 5, dtype=torch.float64).fill_diagonal_(1)
        assert torch.allclose(module.classifier.weight @ module.classifier.weight.T, gram, atol=1e-14)
        logits = (x @ module.layer.weight.T + module.layer.bias) @ module.classifier.weight.T
        return (logits.logsumexp(1) - logits[range(7), 5 - y]).mean()

    def refusals(self):
        return [
            (ValueError, "at least 2; got 1", lambda: DSimplexClassifier(1)),
            (TypeError, "integer; got 3.0", lambda: DSimplexClassifier(3.0)),  # type: ignore[arg-type]
            (TypeError, "True", lambda: simplex_vertices(True)),
            (ValueError, "5 dimensions, one less than the 6 classes", lambda: DSimplexClassifier(6)(torch.zeros(2, 6))),
        ]


@pytest.mark.parametrize("name", ["loss", "loss_small"])
def test_vectors(name):
    case = vectors.load("d-simplex", name)
    h = case.hyperparameters
    classifier = DSimplexClassifier(h["num_classes"], dtype=torch.float64)
    case.close(classifier.weight, "vertices")
    features, old, target = case["features"].requires_grad_(), case["old_features"], case["target"]
    logits = classifier(features)
    case.close(logits, "logits")
    case.close(torch.nn.functional.cross_entropy(logits, target), "ce")
    case.close(HOCLoss(h["mu"])(features, old, target), "hoc")
    loss = StationaryLoss(h["mu"], ce_weight=h["lambda_"])(logits, target, features, old)
    case.close(loss, "loss")
    loss.backward()
    case.close(features.grad, "grad_features")


@pytest.mark.parametrize("count", [2, 3, 17, 1024])
def test_vertices(count):
    V = simplex_vertices(count, dtype=torch.float64)
    assert V.shape == (count, count - 1)
    assert torch.allclose(V @ V.T, torch.eye(count, dtype=torch.float64) * (1 + 1 / (count - 1)) - 1 / (count - 1), atol=1e-12)
    assert float(V.sum(0).abs().max()) < 1e-12
    assert torch.allclose(
        V[-1], V.new_tensor(-1 / math.sqrt(count - 1)), atol=1e-12
    )  # the place, not the shape alone: it is stored


def test_the_vertices_are_saved_and_never_trained():
    classifier = DSimplexClassifier(4)
    assert list(classifier.parameters()) == []
    assert list(classifier.state_dict()) == ["weight"]
    assert classifier.feature_dim == 3
    assert classifier(torch.zeros(2, 5, 3)).shape == (2, 5, 4)
    assert DSimplexClassifier(4).targets(torch.tensor([0, 3])).tolist() == [0, 3]
    assert DSimplexClassifier(4, reverse_labels=True).targets(torch.tensor([0, 3])).tolist() == [3, 0]


def test_without_an_old_model_the_loss_is_the_cross_entropy():
    x, _, y = batch(torch.float32)
    assert StationaryLoss()(x, y) == torch.nn.functional.cross_entropy(x, y)
    with pytest.raises(IndexError):
        StationaryLoss()(x, y + 9)


def test_old_and_new_are_not_the_same():
    x, old, y = batch(torch.float64)
    assert not math.isclose(HOCLoss()(x, old, y).item(), HOCLoss()(old, x, y).item(), rel_tol=1e-3)


def test_the_textbook_form():
    x, old, y = batch(torch.float64)
    f, g = (z / z.norm(dim=1, keepdim=True) for z in (x, old))
    s = 10.0 * g @ f.T
    want = 0.0
    for n in range(7):
        others = [s[n, m].exp() for m in range(7) if y[m] != y[n]]
        want += (-s[n, n] + torch.log(s[n, n].exp() + sum(others))).item() / 7
    assert HOCLoss(exclude_same_class=True)(x, old, y).item() == pytest.approx(want, rel=1e-12)


def test_half_precision_under_autocast():
    x, old, y = batch(torch.float32)
    want = HOCLoss()(x, old, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(HOCLoss()(x, old, y), want)

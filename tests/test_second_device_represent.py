"""Representations answer on a device other than the CPU: their heads, losses, searches, predictions and certificates."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from second_device import numbers, second_device, to_lazy
from second_device_answers import answers_there_as_on_the_cpu


def of_matryoshka_heads(model, x):
    from lowdim.represent import MatryoshkaCrossEntropy, MatryoshkaHead

    found = []
    for efficient in (False, True):
        torch.manual_seed(4)
        head = MatryoshkaHead(12, 5, (3, 6, 12), efficient=efficient).to(x.device)
        target = torch.arange(len(x), device=x.device) % 5
        loss = MatryoshkaCrossEntropy([1.0, 0.5, 2.0])(head(x), target)
        found += [loss, *torch.autograd.grad(loss, head.parameters())]
    return found


def of_matryoshka_embeddings(model, x):
    from lowdim.represent import MatryoshkaEmbeddingLoss

    y = x.detach().requires_grad_()
    loss = MatryoshkaEmbeddingLoss(nn.CosineEmbeddingLoss(), [4, 8, 12])(
        y, x.flip(0), target=torch.ones(len(x), device=x.device)
    )
    return [loss, *torch.autograd.grad(loss, y)]


def of_retrieval(model, x):
    from lowdim.represent import adaptive_retrieve, funnel_retrieve

    two = adaptive_retrieve(x[:9], x, retrieval_dim=4, rerank_dim=12, shortlist=20, k=5)
    many = funnel_retrieve(x[:9], x, retrieval_dim=4, rerank_dims=(8, 12), shortlists=(20, 10))
    return [two.indices, two.distances, many.indices]


def of_stationary_features(model, x):
    from lowdim.represent import DSimplexClassifier, StationaryLoss, compatibility_inequalities, identification_accuracy

    classifier, labels = DSimplexClassifier(13).to(x.device), torch.arange(len(x), device=x.device) % 4
    new = x.detach().requires_grad_()
    loss = StationaryLoss()(classifier(new), classifier.targets(labels), new, x.flip(0))
    old = x.flip(1)
    shares = identification_accuracy(x, labels, old, labels), *compatibility_inequalities(x, old, labels)
    return [loss, *torch.autograd.grad(loss, new), torch.tensor(shares)]


def of_starbucks_scores(model, x):
    from lowdim.represent import nested_whole_word_masks, starbucks_retrieval_loss

    query = torch.stack([x[:4], x[4:8]]).requires_grad_()
    loss = starbucks_retrieval_loss(query, torch.stack([x[8:16], x[16:24]]), (6, 12))
    words = torch.arange(20, device=x.device) // 2
    masks = nested_whole_word_masks(words, order=torch.arange(10, device=x.device).flip(0))
    return [loss, *torch.autograd.grad(loss, query), *(mask.float() for mask in masks)]


def of_cascade(model, x):
    from lowdim.represent import MatryoshkaCascade

    probabilities = x.unflatten(1, (3, 4)).movedim(1, 0).softmax(-1)
    cascade = MatryoshkaCascade((2, 4, 8)).fit(probabilities, torch.arange(len(x), device=x.device) % 4)
    return cascade.predict(probabilities).predictions


def of_episode_features(model, x):
    from lowdim.represent import episode_features

    return list(episode_features(x[:5], x[5:], base_mean=x[0]))


def of_frechet_covariance(model, x):
    from lowdim.represent import FCCovLoss, frechet_cumulative_covariance

    U, y = x[:, :3].detach().requires_grad_(), x[:, 4]
    distances = (y[:, None] - y).abs()
    loss = FCCovLoss()(U, distances)
    return [loss, *torch.autograd.grad(loss, U), frechet_cumulative_covariance(U, distances, return_matrix=True)]


def of_frechet_means(model, x):
    from lowdim.represent import embedding_distances, frechet_one_hot, frechet_predict, frechet_scores

    P = x[:, :6].softmax(1).detach().requires_grad_()
    D = embedding_distances(x[:6])
    found = [D, frechet_scores(P[:, :2], D, [4, 1]), frechet_predict(P, D)]
    for estimator in ("straight_through", "negative", "polytope"):
        one_hot = frechet_one_hot(P, D, estimator=estimator)
        found += [one_hot, *torch.autograd.grad((one_hot * x[:, :6]).sum(), P)]
    return found


def of_label_loci(model, x):
    from lowdim.represent import embedding_distances, label_locus, squared_distance_risk

    D, rows = embedding_distances(x[:8]), torch.arange(3, device=x.device)
    risk = squared_distance_risk(rows, rows.flip(0), D)
    return [*(label_locus(D, rows, method=method) for method in ("lp", "tree")), torch.tensor(risk)]


def of_manifold_linearizing(model, x):
    from lowdim.represent import MLCLoss, TotalCodingRateLoss, membership

    found = []
    for rows in (x, x[:7]):  # more samples than directions, and fewer
        Z = rows.detach().requires_grad_()
        unit = F.normalize(Z, dim=1)
        loss = MLCLoss()(unit, membership(unit)) + TotalCodingRateLoss()(unit, unit.flip(0))
        found += [loss, *torch.autograd.grad(loss, Z)]
    return [*found, membership(F.normalize(x, dim=1), tol=1e-3, iterations=50)]


FUNCTIONS = [value for name, value in list(globals().items()) if name.startswith("of_")]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__.removeprefix("of_"))
def test_functions_answer_there_as_on_the_cpu(function):
    answers_there_as_on_the_cpu(function)


def test_images_are_certified_there():
    from lowdim.represent import DualRandomizedSmoothing, RandomizedSmoothing, fill_masked

    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(24, 3)), torch.rand(2, 1, 4, 6)
    mask = torch.arange(24).view(4, 6) % 3 > 0

    def answers(model, x):
        halves = DualRandomizedSmoothing(model, model, 3, 0.5, masks=(mask, ~mask), fill="maxpool")
        found = [each.certify_all(x, [0, 1], n0=20, n=120) for each in (halves, RandomizedSmoothing(model, 3, 0.5))]
        return [fill_masked(x, mask), *(torch.from_numpy(part) for each in found for part in each)]

    want = answers(model, x)
    with second_device():
        got = answers(to_lazy(model), to_lazy(x))
    torch.testing.assert_close(numbers(got), want)

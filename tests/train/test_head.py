import copy

import pytest
import torch
from torch import nn

from lowdim import models
from lowdim.train.head import fit_head
from lowdim.train.metrics import METRICS
from lowdim.train.tasks import classification
from tiny import write_jsonl


@pytest.fixture(scope="module")
def pooled(pooled_folder, two_classes):
    task = classification(models.load_tokenizer(str(pooled_folder)), [two_classes])
    return models.load_model(str(pooled_folder), "classify"), task


def test_the_head_is_the_logistic_regression_that_it_says(pooled):
    model, task = copy.deepcopy(pooled[0]), pooled[1]
    before = copy.deepcopy(model.encoder.state_dict())
    score = fit_head(model, ("classifier",), task)
    assert score == task.evaluate(model, task.validation, METRICS["accuracy"]), "the layer gives what was fitted"
    assert score >= 0.8, "the words tell the classes apart even at random weights"
    assert all(torch.equal(before[k], v) for k, v in model.encoder.state_dict().items())


def test_logits_are_those_of_scikit_learn(pooled):
    from sklearn.linear_model import LogisticRegression

    model, task = copy.deepcopy(pooled[0]), pooled[1]
    seen = []
    hook = model.classifier.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model.eval()(**task.collate([task.train[i] for i in range(len(task.train))]))
    hook.remove()
    x, y = seen[0].double(), task.train["labels"]
    fit_head(model, ("classifier",), task)
    logits = (x @ model.classifier.weight.double().T + model.classifier.bias.double()).detach()
    scaled = ((x - x.mean(0)) / x.std(0).mean()).numpy()
    gaps = []
    for strength in (0.01, 0.03, 0.1, 0.3, 1.0):
        want = LogisticRegression(C=strength, max_iter=2000).fit(scaled, y).predict_proba(scaled)
        gaps.append((torch.softmax(logits, -1) - torch.tensor(want)).abs().max().item())
    assert min(gaps) < 1e-3


def test_three_classes(bert_folder, tmp_path):
    rows = [(f"{word} {' '.join(rest)}", word) for word in ("good", "bad", "plot") for rest in _pairs()]
    file = write_jsonl(tmp_path / "three.jsonl", rows)
    task = classification(models.load_tokenizer(str(bert_folder)), [file])
    model = models.load_model(str(bert_folder), "classify", num_labels=3)
    score = fit_head(model, ("classifier",), task)
    assert model.classifier.weight.shape[0] == 3
    assert score == task.evaluate(model, task.validation, METRICS["accuracy"])
    assert score > 0.6


def _pairs():
    words = ("the", "film", "was", "a", "and")
    return [(a, b) for a in words for b in words if a != b]


def test_a_bfloat16_head(pooled_folder, two_classes):
    task = classification(models.load_tokenizer(str(pooled_folder)), [two_classes])
    model = models.load_model(str(pooled_folder), "classify", dtype=torch.bfloat16)
    assert fit_head(model, ("classifier",), task) > 0.7
    assert model.classifier.weight.dtype == torch.bfloat16


class Deep(nn.Module):
    """A head that is fed one vector a token, as some classifiers of sequences are."""

    def __init__(self):
        super().__init__()
        self.states = nn.Embedding(40, 4)
        self.classifier = nn.Linear(4, 2)
        self.other = nn.Sequential(nn.Linear(4, 2))

    def forward(self, input_ids, attention_mask=None, labels=None):
        from types import SimpleNamespace

        return SimpleNamespace(logits=self.classifier(self.states(input_ids))[:, 0])


@pytest.mark.parametrize("head", [("classifier",), ("other",), ("classifier", "other"), ()])
def test_other_heads_keep_their_start(pooled, head):
    model = Deep().train()
    before = copy.deepcopy(model.state_dict())
    assert fit_head(model, head, pooled[1]) is None
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert model.training
    assert not model.classifier._forward_pre_hooks

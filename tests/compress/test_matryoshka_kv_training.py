"""MatryoshkaKV in training: the loss, a step by the formula, and bases that stay orthogonal."""

import pytest
import torch
from projected_models import logits, projected, projections
from torch.nn import functional as F

import kv_models
import vectors
from lowdim.compress import (
    MatryoshkaKVConfig,
    matryoshka_freeze,
    matryoshka_loss,
    matryoshka_step,
    sample_kv_ranks,
    set_kv_ranks,
)

pytest.importorskip("transformers")


def test_reference_loss():
    v = vectors.load("matryoshka-kv", "loss")
    student = v["student"].requires_grad_()
    temperature = v.hyperparameters["temperature"]

    def loss(kl, ce):
        return matryoshka_loss(student, v["teacher"], v["labels"], kl_weight=kl, ce_weight=ce, temperature=temperature)

    v.close(loss(1.0, 0.0), "kl")  # with T²
    v.close(loss(0.0, 1.0), "ce")
    total = loss(v.hyperparameters["kl_weight"], v.hyperparameters["ce_weight"])
    v.close(total, "loss")
    total.backward()
    v.close(student.grad, "grad")


def test_a_step_trains_the_projections_alone_and_restores_the_ranks():
    model = projected(dtype=torch.float32, key_ranks=4, value_ranks=3)
    config, batch = MatryoshkaKVConfig(rank_step=2), kv_models.batches()[0]
    parameters = matryoshka_freeze(model)
    assert {id(p) for p in parameters} == {id(p) for p in model.parameters() if p.requires_grad}
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        f"model.layers.{i}.self_attn.lowdim_kv.{name}" for i in (0, 1) for name in ("key_raw", "value_raw", "value_mean")
    ]
    loss = matryoshka_step(model, batch, config, seed=0)
    loss.backward()
    assert all(bool(p.grad.any()) for p in parameters)
    assert [p.ranks for p in projections(model)] == [((4, 4), (3, 3))] * 2
    assert float(matryoshka_step(model, batch, config, seed=0).detach()) == float(loss.detach())
    assert float(matryoshka_step(model, batch, config, seed=1).detach()) != float(loss.detach())


def test_a_step_is_the_formula():
    model = projected(dtype=torch.float64)
    batch = kv_models.batches()[0]
    labels = batch["input_ids"].clone()
    labels[:, :5] = -100
    config = MatryoshkaKVConfig(rank_step=1, kl_weight=0.5, ce_weight=2.0, temperature=3.0)
    got = matryoshka_step(model, {**batch, "labels": labels}, config, generator=torch.Generator().manual_seed(5))
    draw = torch.Generator().manual_seed(5)
    drawn = [sample_kv_ranks(1, 2, 8, 1, draw) for _ in range(2)]
    teacher = logits(model, batch["input_ids"])
    set_kv_ranks(model, [k[0] for k, _ in drawn], [v[0] for _, v in drawn])
    student = logits(model, batch["input_ids"])
    p, q = (F.log_softmax(x / 3, -1) for x in (teacher, student))
    kl = (p.exp() * (p - q)).sum(-1).mean()
    ce = -F.log_softmax(student[:, 4:-1], -1).gather(-1, batch["input_ids"][:, 5:, None]).mean()
    assert float(got.detach()) == pytest.approx(float(0.5 * 9 * kl + 2 * ce), rel=1e-10)


def test_training_lowers_the_loss_and_keeps_the_bases_orthogonal():
    model = projected(dtype=torch.float32)
    config, batch = MatryoshkaKVConfig(kl_weight=1.0, ce_weight=0.0, rank_step=2), kv_models.batches()[0]
    optimizer = torch.optim.AdamW(matryoshka_freeze(model), lr=2e-2)

    def loss():
        with torch.no_grad():
            return sum(float(matryoshka_step(model, batch, config, seed=100 + i)) for i in range(8))

    before = loss()
    for step in range(30):
        matryoshka_step(model, batch, config, seed=step).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss() < 0.9 * before
    basis = projections(model)[1].key_basis().detach()
    torch.testing.assert_close(basis @ basis.mT, torch.eye(8).expand(2, 8, 8), rtol=0, atol=1e-5)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_bases_follow_a_fused_optimizer(training):
    """It writes to the parameters without raising their version, as torch.optim.AdamW(fused=True) of the Trainer does."""
    model = projected(dtype=torch.float32, key_ranks=4, value_ranks=3).train(training)
    batch = kv_models.batches()[0]
    before = logits(model)  # computes the bases
    optimizer = torch.optim.AdamW(matryoshka_freeze(model), lr=0.1, fused=True)
    matryoshka_step(model, batch, MatryoshkaKVConfig(), seed=0).backward()
    logits(model)  # and so does this
    optimizer.step()
    for _ in range(2):
        got = logits(model)
        for projection in projections(model):
            projection._bases.clear()
        torch.testing.assert_close(got, logits(model))
        assert not torch.allclose(got, before, atol=1e-3)
        model.eval()

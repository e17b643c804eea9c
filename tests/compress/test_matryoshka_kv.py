"""MatryoshkaKV's bases: the vectors, the principal directions of what attention saw, the report, and copies."""

import copy

import pytest
import torch
from projected_models import logits, projected, projections

import kv_models
import vectors
from lowdim.compress import MatryoshkaKVConfig, kv_pca, last_report, matryoshka_kv, set_kv_ranks
from lowdim.linalg import cayley

pytest.importorskip("transformers")


def test_reference_pca():
    v = vectors.load("matryoshka-kv", "pca")
    mean, basis, eigenvalues = kv_pca(v["states"])
    v.close(mean, "mean")
    v.close(eigenvalues, "eigenvalues")
    half = basis[..., : v.hyperparameters["rank"]]
    v.close(half @ half.mT, "projector_half")


def test_pca_by_hand():
    """Two tokens on a line through (1, 0): all variance is along the second axis."""
    states = torch.tensor([[[1.0, 3.0]], [[1.0, -1.0]]])
    mean, basis, eigenvalues = kv_pca(states)
    assert mean.tolist() == [[1.0, 1.0]]
    assert eigenvalues.tolist() == [[4.0, 0.0]]
    assert basis.tolist() == [[[0.0, 1.0], [1.0, 0.0]]]


def test_a_large_mean_does_not_cancel():
    states = torch.randn(200, 1, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    eigenvalues = kv_pca(states + 1e7)[2]
    torch.testing.assert_close(eigenvalues, kv_pca(states)[2], rtol=1e-6, atol=0)


def test_the_bases_are_the_principal_directions_of_what_attention_saw():
    """Keys after the rotary embedding, values, without padding; the mean of the values is kept."""
    model = kv_models.build(dtype=torch.float64)
    layer = model.model.layers[0]
    ids = kv_models.ids(4, 10)
    mask = torch.ones_like(ids)
    mask[0, :4] = mask[2, :7] = 0  # padding on the left
    found = {}
    handle = layer.self_attn.register_forward_pre_hook(lambda _, args, kwargs: found.update(kwargs), with_kwargs=True)
    logits(model, ids, attention_mask=mask)
    handle.remove()
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    x = found["hidden_states"].detach()
    k, v = (p(x).detach().unflatten(-1, (2, 8)).transpose(1, 2) for p in (layer.self_attn.k_proj, layer.self_attn.v_proj))
    _, k = apply_rotary_pos_emb(k, k, *found["position_embeddings"])
    matryoshka_kv(model, MatryoshkaKVConfig(), [{"input_ids": ids, "attention_mask": mask}])
    got = layer.self_attn.lowdim_kv
    for states, basis in ((k, got.key_basis().detach()), (v, got.value_basis().detach())):
        rows = states.transpose(1, 2)[mask.bool()]  # (tokens, heads, d)
        for h in range(2):
            covariance = torch.cov(rows[:, h].T, correction=0)
            turned = basis[h].T @ covariance @ basis[h]
            want = torch.linalg.eigvalsh(covariance).flip(0)
            torch.testing.assert_close(turned, torch.diag(want), rtol=1e-7, atol=float(1e-9 * want[0]))
    torch.testing.assert_close(got.value_mean, v.transpose(1, 2)[mask.bool()].mean(0))


def test_bases_are_computed_once_and_again_after_a_change():
    module = projections(projected())[0]
    with torch.no_grad():
        first = module.key_basis()
        assert module.key_basis() is first
        module.key_raw[0, 1, 0] += 0.5
        assert not torch.equal(module.key_basis(), first)
        torch.testing.assert_close(module.key_basis(), cayley(module.key_raw))
    assert module.key_basis().requires_grad  # with gradients there is a graph, and nothing is kept


def test_report():
    model = projected(key_ranks=[[2, 4], [8, 8]], value_ranks=3)
    report = last_report(model)
    names = [f"model.layers.{i}.self_attn.{side}" for i in (0, 1) for side in ("keys", "values")]
    assert [row.name for row in report.layers] == names
    assert [row.what for row in report.layers] == ["ranks 2 to 4 of 8", "rank 3 of 8", "rank 8 of 8", "rank 3 of 8"]
    assert [(row.before, row.after) for row in report.layers] == [(16, 6), (16, 6), (16, 16), (16, 6)]
    assert "64 -> 34 cached numbers per token" in report.summary
    assert report.layers[2].relative_error == 0
    assert 0 < report.layers[1].relative_error < 1


def test_a_second_call_starts_from_the_dense_model():
    model, again = projected(key_ranks=2), projected(key_ranks=2)
    matryoshka_kv(again, MatryoshkaKVConfig(key_ranks=2), kv_models.batches())
    assert torch.equal(logits(model), logits(again))


def test_batches_are_consumed_once_and_the_model_is_otherwise_as_it_was():
    model = kv_models.build().train()
    model.lm_head.weight.requires_grad_(False)
    before = {name: p.clone() for name, p in model.named_parameters()}
    matryoshka_kv(model, MatryoshkaKVConfig(key_ranks=3), iter(kv_models.batches()))
    assert {module.training for module in model.modules()} == {True}
    assert all(torch.equal(p, model.get_parameter(name)) for name, p in before.items())
    assert not model.lm_head.weight.requires_grad
    assert model.model.embed_tokens.weight.requires_grad
    assert not any("recorder" in key for module in model.modules() for key in vars(module))


def test_a_copy_is_independent():
    model = projected(key_ranks=4)
    other, want = copy.deepcopy(model), logits(model)
    set_kv_ranks(other, 1, 1)
    assert torch.equal(logits(model), want)
    assert not torch.equal(logits(other), want)

"""MatryoshkaKV's attention without a cache: the vectors, the formula of each head, and the dense model at full rank."""

import pytest
import torch
from projected_models import logits, projected

import kv_models
import vectors
from lowdim.compress import MatryoshkaKVConfig, MatryoshkaProjection, matryoshka_attention, matryoshka_kv, set_kv_ranks
from lowdim.linalg import cayley

pytest.importorskip("transformers")


def one_head(q, k, v, u_k, u_v, mean, r, s, scaling, mask):
    """The formula for one query head and its KV head: `(queries, d)`."""
    scores = scaling * (q @ u_k[:, :r]) @ (k @ u_k[:, :r]).T + mask
    shares = scores.exp() / scores.exp().sum(-1, keepdim=True)
    return shares @ ((v - mean) @ u_v[:, :s]) @ u_v[:, :s].T + mean


@pytest.mark.parametrize("case", ["attention_mha", "attention_gqa"])
def test_reference_attention(case):
    v = vectors.load("matryoshka-kv", case)
    key_raw, value_raw = v["key_raw"].requires_grad_(), v["value_raw"].requires_grad_()
    bases = {"key_basis": cayley(key_raw), "value_basis": cayley(value_raw)}
    v.close(bases["key_basis"], "key_basis")
    v.close(bases["value_basis"], "value_basis")
    how = {name: v[name] for name in ("value_mean", "key_ranks", "value_ranks")}
    how |= {"scaling": v.hyperparameters["scaling"], "attention_mask": v["mask"]}
    output, weights = matryoshka_attention(v["query"], v["key"], v["value"], **bases, **how)
    v.close(output, "output")
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]), rtol=1e-9, atol=1e-9)
    output.square().sum().backward()
    v.close(key_raw.grad, "grad_key_raw")
    v.close(value_raw.grad, "grad_value_raw")

    padded = [torch.zeros_like(v["key"]), torch.zeros_like(v["key"])]
    for h, (r, s) in enumerate(zip(how["key_ranks"].tolist(), how["value_ranks"].tolist())):
        padded[0][:, h, :, :r] = v["key"][:, h] @ v["key_basis"][h, :, :r]
        padded[1][:, h, :, :s] = (v["value"][:, h] - v["value_mean"][h]) @ v["value_basis"][h, :, :s]
    largest = int(how["key_ranks"].max()), int(how["value_ranks"].max())
    for widths in ((v["key"].shape[-1],) * 2, largest):
        given = [states[..., :width] for states, width in zip(padded, widths)]
        v.close(matryoshka_attention(v["query"], *given, **bases, **how, compressed=True)[0], "output")


@pytest.mark.parametrize("case", ["attention_mha", "attention_gqa"])
def test_reference_projection_in_a_layer(case):
    """The module of a layer gives the same, with and without blocks."""
    v = vectors.load("matryoshka-kv", case)
    module = MatryoshkaProjection(*v["key_raw"].shape[:2], dtype=torch.float64)
    with torch.no_grad():
        for name in ("key_raw", "value_raw", "value_mean"):
            getattr(module, name).copy_(v[name])
    module.set_ranks(v["key_ranks"], v["value_ranks"])
    how = {"scaling": v.hyperparameters["scaling"], "mask": v["mask"]}
    output, _ = module.attention(v["query"], v["key"], v["value"], **how)
    v.close(output, "output")
    output.square().sum().backward()
    v.close(module.key_raw.grad, "grad_key_raw")
    v.close(module.value_raw.grad, "grad_value_raw")
    with torch.no_grad():
        heads = module.heads(torch.float64)
        handed = module.hand_over(heads, [part.compress(v["key"], v["value"]) for part in heads])
        v.close(module.attention(v["query"], *handed, **how)[0], "output")


@pytest.mark.parametrize("heads", [2, 4, 6])
def test_attention_head_by_head(heads):
    draw = torch.Generator().manual_seed(heads)
    q = torch.randn(2, heads, 5, 6, dtype=torch.float64, generator=draw)
    k, v = torch.randn(2, 2, 2, 7, 6, dtype=torch.float64, generator=draw)
    u_k, u_v = cayley(torch.randn(2, 2, 6, 6, dtype=torch.float64, generator=draw))
    mean = torch.randn(2, 6, dtype=torch.float64, generator=draw)
    mask = torch.randn(2, 1, 5, 9, dtype=torch.float64, generator=draw)  # longer than the tokens
    r, s = [2, 5], [6, 1]
    output, _ = matryoshka_attention(
        q,
        k,
        v,
        key_basis=u_k,
        value_basis=u_v,
        value_mean=mean,
        key_ranks=r,
        value_ranks=s,
        scaling=0.3,
        attention_mask=mask,
    )
    for b in range(2):
        for h in range(heads):
            g = h // (heads // 2)
            want = one_head(q[b, h], k[b, g], v[b, g], u_k[g], u_v[g], mean[g], r[g], s[g], 0.3, mask[b, 0, :, :7])
            torch.testing.assert_close(output[b, :, h], want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", kv_models.MODELS)
def test_full_rank_is_the_dense_model(name):
    model = kv_models.build(name)
    ids, mask = kv_models.ids(3, 12), torch.ones(3, 12, dtype=torch.int64)
    mask[1, :5] = 0
    want = logits(model, ids, attention_mask=mask)
    matryoshka_kv(model, MatryoshkaKVConfig(), kv_models.batches())
    got = logits(model, ids, attention_mask=mask)
    real = mask.bool()
    torch.testing.assert_close(got[real], want[real], rtol=1e-4, atol=1e-5 * float(want.abs().max()))
    set_kv_ranks(model, 2, 2)
    assert float((logits(model, ids, attention_mask=mask) - want)[real].abs().max()) > 0.02 * float(want.abs().max())


@pytest.mark.parametrize("side", ["key", "value"])
def test_error_falls_with_the_rank(side):
    model = projected()
    want, errors = logits(model), []
    for rank in (1, 2, 4, 6, 8):
        set_kv_ranks(model, **{f"{side}_ranks": rank})
        errors.append(float((logits(model) - want).norm()))
    assert errors[0] > errors[2] > errors[3] > errors[4]
    assert errors[4] < 1e-9


def test_weights_are_given_when_they_are_asked_for():
    model, dense = projected(), kv_models.build(dtype=torch.float64)
    dense.set_attn_implementation("eager")
    ids = kv_models.ids()
    with torch.no_grad():
        ours, theirs = (m(ids, output_attentions=True).attentions for m in (model, dense))
    assert len(ours) == 2
    for mine, other in zip(ours, theirs):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)  # theirs in float32


def test_dropout_drops_weights_and_not_the_mean():
    """With values equal to their mean nothing is left to drop."""
    module = MatryoshkaProjection(1, 4, dtype=torch.float64)
    with torch.no_grad():
        module.value_mean.fill_(2.0)
    q, k = torch.randn(2, 1, 1, 3, 4, dtype=torch.float64)
    output, _ = module.attention(q, k, torch.full_like(k, 2.0), scaling=0.5, dropout=0.5)
    torch.testing.assert_close(output, torch.full_like(output, 2.0))
    torch.manual_seed(0)
    value = torch.full_like(k, 3.0)
    outputs = [module.attention(q, k, value, scaling=0.5, dropout=d, weights=True)[0] for d in (0.0, 0.5)]
    torch.testing.assert_close(outputs[0], torch.full_like(outputs[0], 3.0))
    assert not torch.allclose(outputs[1], outputs[0])


def test_unknown_keywords_of_attention_are_refused():
    from lowdim.compress.matryoshka_kv.interface import projected_attention

    layer, x = projected().model.layers[0].self_attn, torch.randn(1, 2, 3, 8)
    with pytest.raises(NotImplementedError, match=r"layer 0 \(LlamaAttention\).*s_aux"):
        projected_attention(layer, torch.randn(1, 4, 3, 8), x, x, None, s_aux=torch.zeros(4))

"""LoRA limits of whole models: every head has the figures of `lora_limits` on its own weights."""

import pytest
import torch
from torch import nn

from lowdim import adapt
from lowdim.adapters import LoRA
from lowdim.diagnose import lora_limits, lora_limits_of
from lowdim.errors import NoMatchingModuleError
from lowdim.testing.agreement import agrees
from lowdim.testing.result_case import ResultCase


class Attention(nn.Module):
    """Four query heads of width 3 over two key heads, with biases."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(8, 12), nn.Linear(8, 6), nn.Linear(8, 6)
        self.o_proj = nn.Linear(12, 8)

    def forward(self, x):
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q, k, v = (part.unflatten(-1, (-1, 3)).transpose(1, 2) for part in (q, k, v))
        k, v = (part.repeat_interleave(2, dim=1) for part in (k, v))
        return self.o_proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.config = type("Config", (), {"num_attention_heads": 4, "num_key_value_heads": 2})()
        self.embed = nn.Embedding(20, 8)
        self.layers = nn.ModuleList(Attention() for _ in range(2))

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = x + layer(x)
        return x


def model():
    torch.manual_seed(0)
    return Model().double()


def batch():
    g = torch.Generator().manual_seed(1)
    ids = torch.stack([torch.randperm(20, generator=g)[:10] for _ in range(3)])  # no token twice: the largest is in one row
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def adapted():
    made = model()
    adapt(made, LoRA(rank=2, alpha=6, target_modules=["q_proj"]))
    with torch.no_grad():
        for layer in made.layers:
            layer.q_proj.update.B.normal_(generator=torch.Generator().manual_seed(2))
    return made


class TestLoRALimitsOf(ResultCase):
    plots = True
    tolerance = 1e-9

    def result(self):
        return lora_limits_of(adapted(), batch(), epsilon=0.01)

    def expected(self):
        heads = []
        made, data = adapted(), batch()
        x = made.embed(data["input_ids"])
        for i, layer in enumerate(made.layers):
            plain = {m: getattr(layer, f"{m}_proj") for m in "kv"} | {"q": layer.q_proj.base}
            factors = layer.q_proj.update
            for head in range(4):
                place = {"q": head, "k": head // 2, "v": head // 2}
                cut = {m: slice(3 * place[m], 3 * place[m] + 3) for m in "qkv"}
                found = []
                for s in range(3):
                    rows = x[s][data["attention_mask"][s].bool()]
                    ones = torch.cat([rows, torch.ones(len(rows), 1, dtype=rows.dtype)], 1)  # a bias is one more column
                    weights = {m: torch.cat([p.weight[cut[m]], p.bias[cut[m], None]], 1) for m, p in plain.items()}
                    a = torch.cat([factors.A, torch.zeros(2, 1, dtype=rows.dtype)], 1)
                    found.append(lora_limits(ones, weights, {"q": (a, factors.B[cut["q"]])}, alpha=6.0, epsilon=0.01))
                best = max(range(3), key=lambda s: found[s].ratio)
                limits = {field: getattr(found[best], field) for field in found[best].__dataclass_fields__}
                heads.append({"layer": f"layers.{i}", "head": head, "sequence": best, "limits": limits})
            x = x + layer(x)
        return {"heads": heads}

    unchecked = {"notes": "texts"}  # noqa: RUF012

    def refusals(self):
        normed, fused, capped, odd, bad = model(), model(), model(), model(), model()
        normed.layers[1].q_norm = nn.LayerNorm(3)
        for layer in fused.layers:
            layer.qkv_proj = layer.q_proj
            del layer.q_proj
        capped.config.attn_logit_softcapping = 30.0
        odd.config.num_attention_heads = 5
        with torch.no_grad():
            bad.embed.weight.fill_(float("nan"))
        short = {"input_ids": torch.ones(1, 1, dtype=torch.long)}
        return [
            (NotImplementedError, "layers.1: q_norm", lambda: lora_limits_of(normed, batch())),
            (NotImplementedError, "layers.0: its queries, keys and values", lambda: lora_limits_of(fused, batch())),
            (NotImplementedError, "soft-capped", lambda: lora_limits_of(capped, batch())),
            (NotImplementedError, "5 heads do not divide", lambda: lora_limits_of(odd, batch())),
            (NoMatchingModuleError, "query", lambda: lora_limits_of(model(), batch(), query="query")),
            (NoMatchingModuleError, "'key'", lambda: lora_limits_of(model(), batch(), key="key")),
            (ValueError, "1 tokens", lambda: lora_limits_of(model(), short)),
            (ValueError, "layers.0: the input", lambda: lora_limits_of(bad, batch())),
            (ValueError, "heads", lambda: lora_limits_of(model(), batch(), heads=0)),
            (ValueError, "epsilon", lambda: lora_limits_of(model(), batch(), epsilon=1.0)),
            (TypeError, "module", lambda: lora_limits_of(torch.eye(3), batch())),  # type: ignore[arg-type]
        ]

    def test_the_worst_head(self):
        result = self.result()
        assert result.worst.limits.ratio == max(row["ratio"] for row in result.rows())


def test_without_an_adapter_nothing_is_added():
    report = lora_limits_of(model(), batch())
    assert {row["adapter_norm"] for row in report.rows()} == {0.0}


def test_a_peft_model_has_the_same_figures():
    peft = pytest.importorskip("peft", reason="adapters of PEFT are tested where it is installed")
    made = peft.get_peft_model(model(), peft.LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj"]))
    ours = adapted()
    with torch.no_grad():
        for theirs, own in zip(made.base_model.model.layers, ours.layers, strict=True):
            theirs.q_proj.lora_A["default"].weight.copy_(own.q_proj.update.A)
            theirs.q_proj.lora_B["default"].weight.copy_(own.q_proj.update.B)
    before = {k: v.clone() for k, v in made.state_dict().items()}
    want = lora_limits_of(ours, batch()).to_dict()
    got = lora_limits_of(made, batch()).to_dict()
    agrees([head["limits"]["bound"] for head in got["heads"]], [head["limits"]["bound"] for head in want["heads"]], 1e-9)
    assert all(torch.equal(v, before[k]) for k, v in made.state_dict().items())

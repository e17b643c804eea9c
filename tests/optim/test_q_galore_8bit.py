"""Q-GaLore trains 8-bit weights: rounding noise, gradients that are used once, resumption to the bit, and memory."""

import copy
import dataclasses
import io

import pytest
import torch
from eight_bit_problem import EIGHT
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lowdim.linalg import dequantize_affine, quantize_affine, stream
from lowdim.optim import Int8Linear, Int8Parameter, QGaLore, quantize_linears, state_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"layerwise": True}, {"layerwise": True, "max_norm": 0.5}, {"stagger": True}])
def test_learns(dtype, options):
    net = EIGHT.model(dtype)
    losses = EIGHT.run(net, EIGHT.make(net, **options), range(120), dtype)
    assert sum(losses[-10:]) < 0.33 * sum(losses[:10]), losses[::10]
    weights = [p for p in net.parameters() if p.ndim == 2]
    assert len(weights) == 3
    assert all(type(p) is Int8Parameter and p.float_grad is None for p in weights)
    assert all(p.scales.dtype == dtype for p in weights)


def test_rounding_noise_is_fresh_in_every_step_and_for_every_weight():
    """Steps of a tenth of a code: fifty of them move nearly every weight, by five codes on average.

    With the same noise each time a tenth of the weights would move in every step and the others never.
    """
    values = torch.rand(40, 16, generator=stream(0, "values")) - 0.5
    values[:, 0], values[:, 1] = -1.0, 1.0  # they hold the range of their group, and get no gradient
    codes, code = quantize_affine(values, group_size=16), 2 / 255
    pair = [Int8Parameter(*(t.clone() for t in codes), group_size=16) for _ in range(2)]
    optimizer = QGaLore([{"params": pair, "rank": None}], lr=code / 10, inner="adamw")
    for _ in range(50):
        for p in pair:
            p.float_grad = torch.ones(40, 16)
            p.float_grad[:, :2] = 0
        optimizer.step()
    for p in pair:
        moved = dequantize_affine(*codes, group_size=16) - dequantize_affine(p.detach(), p.scales, p.zeros, group_size=16)
        moved = moved[:, 2:] / code
        assert float((moved > 0.5).double().mean()) > 0.95
        assert abs(float(moved.mean()) - 5) < 0.3
    assert not torch.equal(*(p.detach() for p in pair))


def test_same_bits_with_the_same_seed_and_other_bits_with_another():
    ends = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(ends))
        net = EIGHT.model()
        EIGHT.run(net, EIGHT.make(net, seed=seed), range(7))
        ends.append(EIGHT.dense(net))
    EIGHT.same(ends[0], ends[1])
    assert not torch.equal(ends[0][0], ends[2][0])


def test_layerwise_gives_the_same_bits():
    """And one gradient lives at a time: each is gone before the next layer's is there."""
    nets = EIGHT.model(torch.float64), EIGHT.model(torch.float64)
    plain, layered = EIGHT.make(nets[0], foreach=False), EIGHT.make(nets[1], layerwise=True, foreach=False)
    alive: list = []
    weights = [m.weight for m in nets[1] if isinstance(m, Int8Linear)]
    for weight in weights:
        weight.anchor.register_post_accumulate_grad_hook(lambda _: alive.append(sum(w.float_grad is not None for w in weights)))
    EIGHT.run(nets[0], plain, range(7), torch.float64)
    EIGHT.run(nets[1], layered, range(7), torch.float64)
    EIGHT.same(EIGHT.dense(nets[0]), EIGHT.dense(nets[1]))
    assert set(alive) == {0}
    layered.remove_hooks()
    EIGHT.loss(nets[1], 0, torch.float64).backward()
    assert all(w.float_grad is not None for w in weights)


def test_micro_batches():
    """Two half batches are one batch: in `float_grad`, and projected where layerwise."""
    ends = []
    for options in ({}, {"layerwise": True, "accumulate": 2}):
        net = EIGHT.model(torch.float64, stochastic_round=False)
        optimizer = EIGHT.make(net, **options)
        for step in range(5):
            for micro in range(2):
                (EIGHT.loss(net, 2 * step + micro, torch.float64) / 2).backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append(EIGHT.dense(net))
    EIGHT.close(ends[0], ends[1], 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"cos_threshold": 0.0, "queue_size": 2, "min_8bit_size": 16, "stagger": True}])
def test_exact_resume(dtype, options):
    """Through a file, in the middle of an interval and of the queue, with the rounding noise going on where it was."""
    net = EIGHT.model(dtype)
    optimizer = EIGHT.make(net, **options)
    EIGHT.run(net, optimizer, range(8), dtype)
    file = io.BytesIO()
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, file)
    EIGHT.run(net, optimizer, range(8, 20), dtype)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = EIGHT.model(dtype)
    other.load_state_dict(saved["net"])
    again = EIGHT.make(other, **options)
    again.load_state_dict(saved["optimizer"])
    EIGHT.run(other, again, range(8, 20), dtype)
    EIGHT.same(list(net.state_dict().values()), list(other.state_dict().values()))
    for a, b in zip(optimizer.state.values(), again.state.values(), strict=True):
        assert a.keys() == b.keys()
        assert all(isinstance(v, (torch.Tensor, int, float)) for v in a.values())
        assert all(torch.equal(v, b[k]) if isinstance(v, torch.Tensor) else v == b[k] for k, v in a.items())


def test_deepcopy():
    net = EIGHT.model()
    optimizer = EIGHT.make(net, layerwise=True)
    EIGHT.run(net, optimizer, range(2))
    net2, optimizer2 = copy.deepcopy((net, optimizer))
    EIGHT.run(net, optimizer, range(2, 6))
    EIGHT.run(net2, optimizer2, range(2, 6))
    EIGHT.same(EIGHT.dense(net), EIGHT.dense(net2))


def test_small_updates_survive_stochastic_rounding_only():
    """Steps of a twentieth of a code: nearest rounding drops all of them, stochastic rounding none on average."""
    moved = {}
    for stochastic in (True, False):
        linear = nn.Linear(256, 64, bias=False)
        linear.weight.data.copy_(torch.randn(64, 256, generator=stream(0, "w")))
        layer = Int8Linear.from_linear(linear, stochastic_round=stochastic)
        start = layer.dense_weight()
        code = float(layer.scales.mean())
        optimizer = QGaLore([{"params": [layer.weight], "rank": None}], lr=code / 20)
        direction = torch.ones(64, 256)
        for _ in range(20):
            layer.weight.float_grad = direction.clone()
            optimizer.step()
        moved[stochastic] = float((start - layer.dense_weight()).mean()) / code
    assert moved[True] == pytest.approx(1.0, abs=0.1)
    assert abs(moved[False]) < 0.3


def test_gradients_are_used_once():
    net = EIGHT.model()
    optimizer = EIGHT.make(net)
    EIGHT.loss(net, 0).backward()
    optimizer.zero_grad()
    assert all(p.float_grad is None for p in net.parameters() if isinstance(p, Int8Parameter))
    before = EIGHT.dense(net)
    optimizer.step()
    EIGHT.same(before, EIGHT.dense(net))


def test_clipping_sees_8bit_weights():
    net = EIGHT.model()
    optimizer = EIGHT.make(net, max_norm=1e-3)
    EIGHT.run(net, optimizer, range(1))
    assert optimizer.log()["projected_norm"] > 1e-3
    lows = sum(float(s["exp_avg"].square().sum()) for s in optimizer.state.values()) ** 0.5
    assert lows == pytest.approx(0.1 * 1e-3, rel=0.01)


@pytest.mark.parametrize("layerwise", [False, True])
def test_runs_on_fake_tensors(layerwise):
    net = EIGHT.model()
    optimizer = EIGHT.make(net)
    EIGHT.run(net, optimizer, range(1))
    with FakeTensorMode():
        fake = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 5))
        forecast = EIGHT.make(quantize_linears(fake, None, group_size=16), layerwise=layerwise)
        for _ in range(4):
            fake(torch.zeros(3, 6)).sum().backward()
            forecast.step()
            forecast.zero_grad()
    assert state_bytes(forecast) == state_bytes(optimizer)
    EIGHT.run(net, optimizer, range(1, 5))


@pytest.mark.slow
def test_seven_billion_weights_in_16_gigabytes():
    """The paper's claim as a forecast: LLaMA-7B in bfloat16, its rank, layerwise, short sequences, checkpointing."""
    transformers = pytest.importorskip("transformers")
    from lowdim.catalogue import variant
    from lowdim.plan import forecast

    chosen = dataclasses.replace(variant("q-galore"), options={"rank": 1024, "update_interval": 200})
    how = {"task": "causal-lm", "dtype": torch.bfloat16, "batch_size": 1, "sequence_length": 256}
    got = forecast(transformers.LlamaConfig(), chosen, layerwise=True, gradient_checkpointing=True, **how)
    assert got.weights < 6.7 * 2**30  # 1.016 byte a weight, and the embeddings in bfloat16
    assert got.gradients < 0.3 * 2**30
    assert got.total < 16e9

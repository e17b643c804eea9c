"""AdamW with moments in 8 bits: torchao's and the formula, its bytes, and a resumption to the same bits."""

import pytest
import torch

from lowdim.optim import AdamW, AdamW8bit, state_bytes
from lowdim.testing.closeness import relative_error


def problem(seed=0, shape=(64, 128), dtype=torch.float32):
    draw = torch.Generator().manual_seed(seed)
    start = torch.nn.Parameter(torch.randn(shape, generator=draw).to(dtype))
    return start, [torch.randn(shape, generator=draw).to(dtype) * 10.0**-k for k in (0, 0, 1, 1, 2)]


def run(optimizer, p, grads):
    for grad in grads:
        p.grad = grad.clone()
        optimizer.step()


def by_hand(p, grads, lr, betas=(0.9, 0.999), eps=1e-8, decay=0.01):
    """AdamW whose moments are rounded to the nearest of 256 values times the largest in each block of 256."""
    from lowdim.linalg import dynamic_codebook

    def kept(value, signed):
        code, blocks = dynamic_codebook(signed), value.reshape(-1, 256)
        largest = blocks.abs().amax(1, keepdim=True)
        unit = torch.where(largest > 0, blocks / largest.clamp_min(1e-30), 0.0)
        return (code[unit.unsqueeze(-1).sub(code).abs().argmin(-1)] * largest).reshape(value.shape)

    w, m, v = p.detach().clone(), torch.zeros_like(p), torch.zeros_like(p)
    for step, g in enumerate(grads, 1):
        w *= 1 - lr * decay
        m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g * g
        w -= lr * (m / (1 - betas[0] ** step)) / ((v / (1 - betas[1] ** step)).sqrt() + eps)
        m, v = kept(m, True), kept(v, False)
    return w


def test_the_formula():
    p, grads = problem()
    start, want = p.detach().clone(), by_hand(p, grads, 1e-2)
    run(AdamW8bit([p], lr=1e-2), p, grads)
    assert relative_error(p.detach() - start, want - start) < 1e-4


def test_torchaos_gives_the_same_up_to_rounding():
    ao = pytest.importorskip("torchao.optim")
    p, grads = problem()
    twin = torch.nn.Parameter(p.detach().clone())
    start = p.detach().clone()
    run(AdamW8bit([p], lr=1e-2, weight_decay=0.01), p, grads)
    with torch.compiler.set_stance("force_eager"):
        run(ao.AdamW8bit([twin], lr=1e-2, weight_decay=0.01), twin, grads)
    assert relative_error(p.detach() - start, twin.detach() - start) < 2e-2


def test_its_state_takes_a_quarter_of_adamws():
    p, grads = problem()
    optimizer = AdamW8bit([p], lr=1e-2)
    run(optimizer, p, grads[:1])
    kept = sum(t.nbytes for t in optimizer.state[p].values() if isinstance(t, torch.Tensor))
    assert kept == 2 * (p.numel() + 4 * p.numel() // 256)
    assert state_bytes(optimizer) == kept
    small = torch.nn.Parameter(torch.zeros(100))
    optimizer = AdamW8bit([small], lr=1e-2)
    run(optimizer, small, [torch.ones(100)])
    assert optimizer.state[small]["exp_avg"].dtype == torch.float32


@pytest.mark.parametrize("master", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_resumed_to_the_same_bits(dtype, master, tmp_path):
    if master and dtype == torch.float32:
        pytest.skip("float32 weights need no masters")
    how = {"lr": 1e-3, "master_weights": master}
    whole, grads = problem(dtype=dtype)
    part = torch.nn.Parameter(whole.detach().clone())
    run(AdamW8bit([whole], **how), whole, grads)
    first = AdamW8bit([part], **how)
    run(first, part, grads[:2])
    torch.save([part.detach(), first.state_dict()], tmp_path / "state.pt")
    value, state = torch.load(tmp_path / "state.pt", weights_only=True)
    again = torch.nn.Parameter(value)
    second = AdamW8bit([again], **how)
    second.load_state_dict(state)
    run(second, again, grads[2:])
    assert torch.equal(again, whole)


def test_small_updates_of_16_bit_weights_add_up():
    p = torch.nn.Parameter(torch.ones(128, 64, dtype=torch.bfloat16))
    optimizer = AdamW8bit([p], lr=1e-4, weight_decay=0.0)
    for _ in range(100):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert float(p.detach().float().mean()) == pytest.approx(0.99, abs=1e-3)


def test_it_is_an_adamw():
    assert issubclass(AdamW8bit, AdamW)
    with pytest.raises(ValueError, match="lr"):
        AdamW8bit([torch.nn.Parameter(torch.zeros(4))], lr=-1.0)

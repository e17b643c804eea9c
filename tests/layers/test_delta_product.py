"""DeltaProduct's layer: however a sequence is split, the same output; the reference numbers; weights of fla."""

import copy
import itertools
import math

import pytest
import torch
from torch.nn import functional as F

import vectors
from lowdim.layers import DeltaProduct, DeltaProductState
from lowdim.linalg import Cost
from lowdim.testing.mixer_case import MixerCase

NAMES = ("q_proj", "k_proj", "v_proj", "b_proj", "a_proj", "g_proj", "o_proj")


def unit(x):
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


class TestDeltaProductAll(MixerCase):
    """Everything on."""

    mixer_class = DeltaProduct
    heads, value_heads, K, V, n, taps = 2, 2, 4, 6, 2, 4
    how = {"num_heads": 2, "head_dim": 4, "expand_v": 1.5, "chunk_size": 4}  # noqa: RUF012 (typed in the base class)
    forget = gate = negative = conv = True

    def chunked(self, mixer, x, size):
        """Within one call, and token by token where there is no size; in the state passed on by the base class, too."""
        mixer.chunk_size = size
        return mixer(x)

    def mixed(self, mixer, x, name, heads):
        """Projection, convolution and SiLU: `(batch, length, sets, heads, entries)`."""
        y = x @ mixer.get_parameter(f"{name}_proj.weight").T
        if self.conv:
            taps, before = mixer.get_parameter(f"{name}_conv.weight"), F.pad(y, (0, 0, self.taps - 1, 0))
            y = sum(before[:, j : j + x.shape[1]] * taps[:, j] for j in range(self.taps))
        return (y * y.sigmoid()).view(*x.shape[:2], -1, heads, self.V if name == "v" else self.K)

    def reference(self, mixer, x):
        """Token by token, with each token's matrices of the state."""
        weights = dict(mixer.named_parameters())
        share = self.value_heads // self.heads
        q, k = (unit(self.mixed(mixer, x, name, self.heads)) for name in "qk")
        q, k = (t.repeat_interleave(share, 3) for t in (q[:, :, :1], k))
        v = self.mixed(mixer, x, "v", self.value_heads)
        beta = (1 + self.negative) / (1 + (-x @ weights["b_proj.weight"].T).exp())
        beta = beta.view(*x.shape[:2], self.n, self.value_heads, 1, 1)
        decay = torch.ones(())
        if self.forget:
            time = (1 + (x @ weights["a_proj.weight"].T + weights["dt_bias"]).exp()).log()
            decay = (-weights["A_log"].exp() * time).exp()[..., None, None]
        S, out = x.new_zeros(len(x), self.value_heads, self.K, self.V), []
        for t in range(x.shape[1]):
            S = S * (decay[:, t] if self.forget else 1)
            for i in range(self.n):
                key = k[:, t, i, :, :, None]
                S = S - beta[:, t, i] * key @ (key.mT @ S) + beta[:, t, i] * key @ v[:, t, i, :, None]
            o = (q[:, t, 0, :, None] @ S)[:, :, 0] / math.sqrt(self.K)
            o = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weights["o_norm.weight"]
            if self.gate:
                gate = x[:, t] @ weights["g_proj.weight"].T
                o = o * (gate * gate.sigmoid()).view_as(o)
            out.append(o.flatten(1) @ weights["o_proj.weight"].T)
        return torch.stack(out, 1)

    def expected_cost(self, batch, length):
        """One whole chunk of 4 tokens after another."""
        mixer, R, d = self.make(), batch * length, self.features
        keys, values, n, c, m = self.heads * self.K, self.value_heads * self.V, self.n, 4, 4 * self.n
        outputs = [keys, n * keys, n * values, n * self.value_heads]
        outputs += [self.value_heads] * self.forget + [values] * self.gate
        flops = 2 * R * d * (sum(outputs) + values)
        numbers = sum(R * (d + o) + d * o for o in [*outputs, values])
        if self.conv:
            channels = keys + n * (keys + values)
            flops, numbers = flops + 2 * R * 4 * channels, numbers + channels * (2 * R + 4)
        K, V, chunks = self.K, self.V, R // c * self.value_heads
        flops += chunks * (2 * m * m * K + m * m * V + 2 * c * m * K + 2 * c * m * V + 4 * m * K * V + 2 * c * K * V)
        numbers += chunks * (m * (K + V + 1) + c * (K + V) + 2 * K * V)
        return Cost(sum(p.numel() for p in mixer.parameters()), flops, 2 * flops, 4 * numbers, 8 * numbers)


class TestDeltaProductGroupedValues(TestDeltaProductAll):
    """Each query and key serves two consecutive value heads; three steps."""

    value_heads, V, n = 4, 4, 3
    how = {"num_heads": 2, "num_v_heads": 4, "head_dim": 4, "expand_v": 1, "num_householder": 3, "chunk_size": 4}  # noqa: RUF012


class TestDeltaProductPlain(TestDeltaProductAll):
    """No gates and no convolution, eigenvalues in [0, 1], one step."""

    V, n = 8, 1
    forget = gate = negative = conv = False
    how = {  # noqa: RUF012
        "num_heads": 2,
        "head_dim": 4,
        "num_householder": 1,
        "use_forget_gate": False,
        "use_output_gate": False,
        "allow_neg_eigval": False,
        "use_short_conv": False,
        "chunk_size": 4,
    }


@pytest.mark.parametrize("chunk", [None, 1, 3, 64])
@pytest.mark.parametrize("case", ["layer", "layer_plain"])
def test_reference_numbers(case, chunk):
    v = vectors.load("delta-product", case)
    layer = DeltaProduct(**v.hyperparameters, chunk_size=chunk, dtype=torch.float64)
    layer.load_state_dict({name: v[name] for name in layer.state_dict()})
    y, state = layer(v["x"], return_state=True)
    v.close(y, "y")
    v.close(state.recurrent, "recurrent_state")


SWITCHES = ("use_forget_gate", "use_output_gate", "allow_neg_eigval", "use_short_conv")


@pytest.mark.parametrize("on", list(itertools.product([True, False], repeat=4)), ids=lambda on: "".join("01"[x] for x in on))
def test_gradients_by_finite_differences(on):
    """Of the input, the carried state and every parameter, for every combination of switches."""
    options = {"num_heads": 1, "num_v_heads": 2, "head_dim": 2, "expand_v": 1.0, "chunk_size": 2, "conv_size": 2}
    layer = DeltaProduct(3, **options, **dict(zip(SWITCHES, on, strict=True)), seed=0, dtype=torch.float64)
    x = torch.randn(1, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    _, state = layer(x[:, :2], return_state=True)
    parts = {name: part.detach().requires_grad_() for name, part in state._asdict().items() if part is not None}
    names = [name for name, _ in layer.named_parameters()]

    def forward(x, *tensors):
        carried = state._replace(**dict(zip(parts, tensors, strict=False)))
        weights = dict(zip(names, tensors[len(parts) :], strict=True))
        y, last = torch.func.functional_call(layer, weights, (x, carried), {"return_state": True})
        return y, last.recurrent

    inputs = (x[:, 2:].clone().requires_grad_(), *parts.values(), *(p.detach().requires_grad_() for p in layer.parameters()))
    assert torch.autograd.gradcheck(forward, inputs, fast_mode=True)


def test_a_width_that_is_an_integer_up_to_rounding():
    assert DeltaProduct(4, num_heads=1, head_dim=100, expand_v=1.1).head_v_dim == 110  # 100 * 1.1 is 110.00000000000001


def small(**changes):
    options = {"num_heads": 2, "num_v_heads": 4, "head_dim": 3, "expand_v": 1.0, "seed": 0, "dtype": torch.float64, **changes}
    return DeltaProduct(6, **options)


def tokens(*shape):
    return torch.randn(*shape, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("gated", [True, False])
def test_the_transition_moves_the_state(gated):
    """Two states that differ by D differ by (A_T ... A_1) D afterwards."""
    layer, x = small(use_forget_gate=gated), tokens(2, 5)
    moved = torch.eye(3, dtype=torch.float64).expand(2, 4, 3, 3)
    for matrix in layer.transition(x).unbind(1):
        moved = matrix @ moved
    start = layer.initial_state(2)
    other = start._replace(recurrent=torch.eye(3, dtype=torch.float64).expand(2, 4, 3, 3))
    ends = [layer(x, state, return_state=True)[1].recurrent for state in (start, other)]
    torch.testing.assert_close(ends[1] - ends[0], moved, rtol=1e-10, atol=1e-12)


def test_eigenvalues_of_a_transition():
    """In [0, 1], or down to −1; one step for each direction that is moved."""
    for negative in (False, True):
        layer = small(num_householder=1, use_forget_gate=False, allow_neg_eigval=negative)
        with torch.no_grad():
            layer.b_proj.weight.mul_(1e3)  # beta at its bounds
        values = torch.linalg.eigvalsh(layer.transition(tokens(2, 9)).detach())
        assert float(values[..., 1:].sub(1).abs().max()) < 1e-9
        assert float(values.min()) == pytest.approx(-1 if negative else 0, abs=1e-4)


def test_initial_numbers():
    layer = DeltaProduct(64, num_heads=256, head_dim=2, expand_v=1.0, seed=0)
    for name in NAMES:
        weight = layer.get_submodule(name).weight.detach()
        bound = 2**-2.5 * math.sqrt(6 / sum(weight.shape))
        assert 0.98 * bound < float(weight.abs().max()) <= bound, name
    for name in ("q_conv", "k_conv", "v_conv"):
        assert 0.48 < float(layer.get_submodule(name).weight.detach().abs().max()) <= 0.5, name
    dt, rate = F.softplus(layer.dt_bias.detach()), layer.A_log.detach().exp()
    assert 1e-3 <= float(dt.min()) < 1.2e-3
    assert 0.08 < float(dt.max()) <= 0.1 * (1 + 1e-5)
    assert float(dt.log().mean()) == pytest.approx(math.log(0.01), abs=0.25)
    assert 0 < float(rate.min()) < 0.3
    assert 15.5 < float(rate.max()) <= 16
    assert float(rate.mean()) == pytest.approx(8, abs=0.7)
    assert bool((layer.o_norm.weight == 1).all())


def test_exponents_are_float32_or_better():
    layer = small(dtype=torch.bfloat16)
    assert {layer.get_parameter(name).dtype for name in layer.no_weight_decay()} == {torch.float32}
    assert layer.no_weight_decay() == {"A_log", "dt_bias"}
    assert layer.initial_state(2).recurrent.dtype == torch.float32
    assert small(use_forget_gate=False).no_weight_decay() == set()


def test_names_of_a_part_that_is_off_are_absent():
    plain = small(use_forget_gate=False, use_output_gate=False, use_short_conv=False).state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in plain.items()}
    assert shapes == {
        "q_proj.weight": (6, 6),
        "k_proj.weight": (12, 6),
        "v_proj.weight": (24, 6),
        "b_proj.weight": (8, 6),
        "o_norm.weight": (3,),
        "o_proj.weight": (6, 12),
    }
    more = {"q_conv.weight", "k_conv.weight", "v_conv.weight", "a_proj.weight", "A_log", "dt_bias", "g_proj.weight"}
    assert small().state_dict().keys() - shapes.keys() == more


def test_a_token_behind_a_hole_is_not_moved_by_it():
    """A masked token in the middle leaves the recurrent state as it is."""
    layer, x = small(use_short_conv=False), tokens(1, 5)
    mask = torch.tensor([[1, 1, 0, 1, 1]])
    y = layer(x, attention_mask=mask)
    want = layer(x[:, [0, 1, 3, 4]])
    torch.testing.assert_close(y[:, [0, 1, 3, 4]], want)


def test_a_prompt_shorter_than_the_convolution():
    layer, x = small(conv_size=4), tokens(2, 1)
    state = layer(x, return_state=True)[1]
    assert state.conv_q.shape == (2, 3, 6)
    assert not bool(state.conv_q[:, :2].any())
    torch.testing.assert_close(state.conv_q[:, 2], x[:, 0] @ layer.q_proj.weight.T)


# --- weights of flash-linear-attention ----------------------------------------------------------------------------------


def theirs(layer, prefix="model.layers.0.attn."):
    found = {}
    for name, tensor in layer.state_dict().items():
        conv = name.endswith("_conv.weight")
        found[prefix + name.replace("_conv.", "_conv1d.")] = tensor[:, None] if conv else tensor
    return found


def test_load_fla():
    source = small(seed=1)
    state = {**theirs(source), "model.layers.1.attn.A_log": torch.zeros(9)}
    layer = small(dtype=torch.float32).load_fla(state, "model.layers.0.attn.")
    assert layer.q_proj.weight.dtype == torch.float32
    torch.testing.assert_close(layer(tokens(2, 7).float()), copy.deepcopy(source).float()(tokens(2, 7).float()))


def test_load_fla_refuses_what_is_another_layer():
    layer = small()
    before = copy.deepcopy(layer.state_dict())
    state = theirs(small(seed=1), "")
    for changed, named in (
        ({**state, "q_conv1d.bias": torch.zeros(6)}, "q_conv1d.bias: convolutions have no bias"),
        ({name: t for name, t in state.items() if name != "A_log"}, "missing A_log"),
        ({**state, "D": torch.zeros(2)}, "left over D"),
        ({**state, "k_conv1d.weight": torch.zeros(12, 1, 3)}, r"k_conv.weight must be \(12, 4\)"),
    ):
        with pytest.raises(ValueError, match=named):
            layer.load_fla(changed)
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())


# --- cost and bad input ---------------------------------------------------------------------------------------------------


def test_cost_token_by_token_and_of_a_short_chunk():
    layer = small(chunk_size=4)
    chunked, recurrent = (layer.cost(2, 6, mode=mode) for mode in ("chunk", "recurrent"))
    rows, K, V, n = 2 * 6 * 4, 3, 3, 2

    def chunk(c):
        m = c * n
        return 2 * m * m * K + m * m * V + 2 * c * m * (K + V) + 4 * m * K * V + 2 * c * K * V

    core = rows * (4 * n * K * V + 2 * K * V + K * V)
    assert recurrent.flops_forward - core == chunked.flops_forward - 2 * 4 * (chunk(4) + chunk(2))
    moved = rows * (2 * K * V * (n + 1) + n * (K + V + 1) + K + V)
    in_chunks = 8 * sum(c * n * (K + V + 1) + c * (K + V) + 2 * K * V for c in (4, 2))
    assert recurrent.bytes_forward - 4 * moved == chunked.bytes_forward - 4 * in_chunks


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"head_dim": 3, "expand_v": 1.5}, r"head_dim \* expand_v must be an integer; got 3 \* 1.5"),
        ({"num_v_heads": 3}, "num_v_heads must be a multiple of num_heads=2; got 3"),
        ({"num_householder": 0}, "num_householder"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"conv_size": 0}, "conv_size"),
        ({"expand_v": 0}, "expand_v"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_options(options, named):
    with pytest.raises(ValueError, match=named):
        small(**options)


def test_a_state_of_another_layer():
    layer, x = small(), tokens(2, 3)
    state = layer.initial_state(2)
    for wrong, named in (
        (state._replace(recurrent=state.recurrent.float()), "state.recurrent must be .* in torch.float64"),
        (state._replace(conv_k=state.conv_k[:, 1:]), "state.conv_k"),
        (DeltaProductState(state.recurrent), "state.conv_q must be a tensor"),
        (state.recurrent, "state must have the parts recurrent, conv_q"),
    ):
        with pytest.raises(ValueError, match=named):
            layer(x, wrong)
        with pytest.raises(ValueError, match=named):
            layer.step(x[:, 0], wrong)
    with pytest.raises(ValueError, match="one token for each sequence"):
        layer.step(x, state)
    with pytest.raises(ValueError, match="mode"):
        layer.cost(1, 1, mode="parallel")

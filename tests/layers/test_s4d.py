"""S4D's layer: convolution, chunks, steps and carried states give the same output; the authors' numbers."""

import math

import pytest
import torch
from torch.nn import functional as F

import vectors
from lowdim.layers import S4D
from lowdim.linalg import Cost
from lowdim.testing.mixer_case import MixerCase


def complexes(pairs):
    return pairs[..., 0] + 1j * pairs[..., 1]


class S4DCase(MixerCase):
    """The recurrence of the paper, token by token."""

    mixer_class = S4D
    how = {"d_state": 8}  # noqa: RUF012 (typed in the base class)
    disc = "zoh"

    def discrete(self, mixer):
        A = -mixer.log_A_real.exp() + 1j * mixer.A_imag
        dt, B = mixer.log_dt.exp()[:, None], complexes(mixer.B)
        if self.disc == "bilinear":
            return (1 + dt * A / 2) / (1 - dt * A / 2), B * dt / (1 - dt * A / 2)
        return (dt * A).exp(), B * ((dt * A).exp() - 1) / A

    def mixed(self, mixer, x):
        factor, gain = self.discrete(mixer)
        state, out = 0, []
        for t in range(x.shape[1]):
            state = factor * state + gain * x[:, t, :, None]
            out.append(2 * (complexes(mixer.C) * state).sum(-1).real + mixer.D * x[:, t])
        return torch.stack(out, 1)

    def reference(self, mixer, x):
        y = self.mixed(mixer, x)
        y = y * (1 + torch.erf(y / math.sqrt(2))) / 2
        first, second = (y @ mixer.output_linear.weight.T + mixer.output_linear.bias).chunk(2, -1)
        return first / (1 + (-second).exp())

    def expected_cost(self, batch, length):
        mixer, H, L, c = self.make(), self.features, length, 1
        c += self.how.get("bidirectional", False)
        E, n = H * 4, 2 * L
        flops = 8 * c * E * L + 2.5 * n * math.log2(n) * H * (2 * batch + 1) + 6 * batch * H * (L + 1)
        flops = math.ceil(flops + 2 * batch * L * H + 4 * batch * L * H * H)
        moved = (5 + 2 * c) * E + 2 * c * H * L + 5 * batch * H * L + 4 * (L + 1) * H * (2 * batch + 1) + 2 * H * H + 2 * H
        return Cost(sum(p.numel() for p in mixer.parameters()), flops, 2 * flops, 4 * moved, 8 * moved)

    @pytest.mark.parametrize("size", [1, 3, 4, 11, 16])
    def test_linear_in_chunks(self, size):
        mixer, x = self.make(), self.tokens()
        _, start = mixer.linear(self.tokens(seed=1), return_state=True)
        want, last = mixer.linear(x, start, return_state=True)
        got, state = mixer.linear(x, start, chunk_size=size, return_state=True)
        self.close(got, want, torch.float64)
        self.close(state, last, torch.float64)
        self.close(mixer.linear(x, chunk_size=size), self.mixed(mixer, x), torch.float64)

    def test_linear_step_by_step(self):
        mixer, x = self.make(), self.tokens()
        state, want = mixer.initial_state(len(x)), self.mixed(mixer, x)
        for t in range(x.shape[1]):
            y, state = mixer.step_linear(x[:, t], state)
            self.close(y, want[:, t], torch.float64)

    def test_dense_weight(self):
        mixer, x = self.make(), self.tokens()
        self.close(torch.einsum("hts,bsh->bth", mixer.dense_weight(x.shape[1]), x), self.mixed(mixer, x), torch.float64)

    def test_the_impulse_response_is_the_kernel(self):
        mixer = self.make()
        impulse = torch.zeros(1, 9, self.features, dtype=torch.float64)
        impulse[:, 0] = 1
        want = self.mixed(mixer, impulse)[0].T.clone()
        want[:, 0] -= mixer.D.detach()
        got = mixer.kernel(9)
        self.close(got[0] if self.how.get("bidirectional") else got, want, torch.float64)


class TestS4DZoh(S4DCase):
    """The defaults."""


class TestS4DBilinear(S4DCase):
    """Another discretisation, from the diagonal of HiPPO-LegS with half of B."""

    disc = "bilinear"
    how = {"d_state": 8, "disc": "bilinear", "init": "legs", "half_B": True}  # noqa: RUF012


class TestS4DFixedB(S4DCase):
    """The authors' minimal layer; a real diagonal."""

    how = {"d_state": 8, "init": "real", "train_B": False}  # noqa: RUF012


class NoRecurrence(S4DCase):
    """What has no state is checked whole."""

    test_chunks_of_any_size_are_the_whole = None  # no state to carry
    test_one_step_at_a_time_is_the_whole = None  # no steps
    test_two_halves_are_the_whole = None  # no state to carry
    test_a_prompt_is_continued_step_by_step = None  # no steps
    test_the_initial_state_is_no_state = None  # there is none
    test_a_state_is_left_as_it_is = None  # there is none
    test_gradients_flow_through_the_carried_state = None  # there is none
    test_padding_on_the_left_changes_nothing = None  # asks for the state; see test_padding_of_a_bidirectional_layer
    test_bfloat16_is_near_the_exact_answer = None  # takes steps
    test_linear_in_chunks = None  # no state to carry
    test_linear_step_by_step = None  # no steps

    def test_no_state_and_no_steps(self):
        mixer, x = self.make(), self.tokens()
        state = TestS4DZoh().make().initial_state(len(x))
        for call in (
            lambda: mixer.initial_state(3),
            lambda: mixer(x, state),
            lambda: mixer(x, return_state=True),
            lambda: mixer.linear(x, chunk_size=4),
            lambda: mixer.step(x[:, 0], state),
            lambda: mixer.step_linear(x[:, 0], state),
        ):
            with pytest.raises(ValueError, match="no recurrence, so no state and no steps"):
                call()


class TestS4DSoftmax(NoRecurrence):
    """DSS: the kernel depends on the length."""

    how = {"d_state": 8, "disc": "dss"}  # noqa: RUF012

    def mixed(self, mixer, x):
        L, A = x.shape[1], -mixer.log_A_real.exp() + 1j * mixer.A_imag
        z = mixer.log_dt.exp()[:, None] * A
        d = A * ((L * z).exp() - 1)
        weights = complexes(mixer.B) * complexes(mixer.C) * (z.exp() - 1) * d.conj() / (d * d.conj() + 1e-7)
        K = torch.stack([(weights * (j * z).exp()).sum(-1).real for j in range(L)])
        return torch.stack([sum(K[t - s] * x[:, s] for s in range(t + 1)) + mixer.D * x[:, t] for t in range(L)], 1)


class TestS4DBidirectional(NoRecurrence):
    """The second kernel starts at the next token."""

    how = {"d_state": 8, "bidirectional": True}  # noqa: RUF012
    test_the_past_does_not_see_the_future = None  # it does, on purpose

    def mixed(self, mixer, x):
        factor, gain = self.discrete(mixer)
        L, C = x.shape[1], complexes(mixer.C)
        K = torch.stack([2 * (C * gain * factor**j).sum(-1).real for j in range(L)], 1)  # (2, L, H)
        out = []
        for t in range(L):
            past = sum(K[0, t - s] * x[:, s] for s in range(t + 1))
            out.append(sum((K[1, s - t - 1] * x[:, s] for s in range(t + 1, L)), past) + mixer.D * x[:, t])
        return torch.stack(out, 1)

    def test_padding_of_a_bidirectional_layer(self):
        """On either side."""
        mixer, x = self.make(), self.tokens()
        mask = torch.ones(3, 11)
        mask[1, :4] = mask[2, 7:] = 0
        y = mixer(x, attention_mask=mask)
        self.close(y[1, 4:], self.reference(mixer, x[1:2, 4:])[0], torch.float64)
        self.close(y[2, :7], self.reference(mixer, x[2:, :7])[0], torch.float64)


def test_official_layer():
    v = vectors.load("s4d", "layer_zoh")
    layer = S4D(3, 8, train_B=False, dtype=torch.float64)
    names = ("log_dt", "log_A_real", "A_imag", "C", "D")
    given = {name: v[name] for name in ("B", *names)}
    layer.load_state_dict({**given, "output_linear.weight": v["output_weight"], "output_linear.bias": v["output_bias"]})
    u = v["u"].requires_grad_()
    v.close(layer.kernel(20), "kernel")
    y = layer(u)
    v.close(y, "y")
    grads = torch.autograd.grad((y * v["grad_y"]).sum(), [u, *(layer.get_parameter(name) for name in names)])
    for name, grad in zip(("u", *names), grads, strict=True):
        v.close(grad, f"grad_{name}")


@pytest.mark.parametrize("chunk", [None, 1, 5])
def test_official_recurrence(chunk):
    v = vectors.load("s4d", "bilinear_recurrent")
    layer = S4D(3, 8, disc="bilinear", dtype=torch.float64)
    names = ("log_dt", "log_A_real", "A_imag", "B", "C")
    layer.load_state_dict({**layer.state_dict(), **{name: v[name] for name in names}, "D": torch.zeros(3)})
    y, state = layer.linear(v["u"], chunk_size=chunk, return_state=True)
    v.close(y, "y_linear")
    v.close(torch.view_as_real(state), "state")


def test_first_numbers():
    layer = S4D(400, 64, init="inv", dt_min=0.01, dt_max=0.2, seed=0)
    dt = layer.log_dt.detach().exp()
    assert 0.01 * (1 - 1e-5) <= float(dt.min()) < 0.0105
    assert 0.19 < float(dt.max()) <= 0.2 * (1 + 1e-5)
    assert float(layer.log_dt.detach().mean()) == pytest.approx((math.log(0.01) + math.log(0.2)) / 2, abs=0.1)
    assert float(layer.C.detach().std()) == pytest.approx(math.sqrt(0.5), rel=0.02)
    assert float(layer.D.detach().std()) == pytest.approx(1, rel=0.15)
    assert bool((layer.A_imag[:, 0] == layer.A_imag[0, 0]).all())
    assert float(layer.A_imag.detach()[0, 0]) == pytest.approx(64 / math.pi * 63)
    assert 0.049 < float(layer.output_linear.weight.detach().abs().max()) <= 0.05  # 1/sqrt(400)
    drawn = S4D(3, 8, init="random", seed=0).A_imag
    assert drawn.unique().numel() == 12, "drawn for each feature"


def test_options_of_b():
    whole, half = (S4D(3, 16, init="legs", half_B=half, dtype=torch.float64).B.detach() for half in (False, True))
    assert float(whole.max()) == 2
    torch.testing.assert_close(half, whole / 2)
    assert float(S4D(3, 16, init="legs", b_clip=None).B.detach().max()) > 9


def test_a_generator_wins_over_a_seed():
    one, two = (S4D(3, 8, seed=seed, generator=torch.Generator().manual_seed(7)) for seed in (0, 1))
    assert torch.equal(one.C, two.C)


def test_dropout_keeps_or_drops_whole_features():
    layer, x = S4D(64, 8, dropout=0.5, seed=0), torch.randn(2, 5, 64)
    layer.output_linear = torch.nn.Linear(64, 128)
    with torch.no_grad():
        layer.output_linear.weight.copy_(torch.cat([torch.eye(64), torch.zeros(64, 64)]))
        layer.output_linear.bias.zero_()
    y = 2 * layer(x)  # GLU halves
    kept = (y != 0).all(1)
    assert torch.equal(kept, (y != 0).any(1))
    assert 0.25 < float(kept.float().mean()) < 0.75
    want = 2 * F.gelu(layer.linear(x)) * kept[:, None]
    torch.testing.assert_close(y, want)
    assert torch.equal(layer.eval()(x), layer(x))


def test_groups_for_an_optimizer():
    layer = S4D(3, 8)
    fast, slow = layer.param_groups(0.01, ssm_lr=0.002, weight_decay=0.1)
    names = {id(p): name for name, p in layer.named_parameters()}
    assert {names[id(p)] for p in slow["params"]} == {"log_dt", "log_A_real", "A_imag", "B"} == layer.no_weight_decay()
    assert {names[id(p)] for p in fast["params"]} == {"C", "D", "output_linear.weight", "output_linear.bias"}
    assert (fast["lr"], fast["weight_decay"], slow["lr"], slow["weight_decay"]) == (0.01, 0.1, 0.002, 0.0)
    fixed = S4D(3, 8, train_B=False)
    assert "B" not in fixed.no_weight_decay() | {name for name, _ in fixed.named_parameters()}
    assert "B" in fixed.state_dict()


def test_half_precision_keeps_exponents_exact():
    layer = S4D(3, 8, dtype=torch.bfloat16)
    assert {layer.get_parameter(name).dtype for name in ("log_dt", "log_A_real", "A_imag")} == {torch.float32}
    assert layer.initial_state(2).dtype == torch.complex64


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"d_state": 7}, "d_state must be even"),
        ({"d_state": 0}, "d_state"),
        ({"init": "hippo"}, "init"),
        ({"disc": "euler"}, "disc"),
        ({"dt_min": 0}, "dt_min"),
        ({"dt_min": 0.2}, "dt_max must be at least dt_min=0.2.*0.1"),
        ({"dropout": 1.5}, "dropout"),
        ({"b_clip": -1.0}, "b_clip"),
        ({"d_model": 0}, "d_model"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_options(options, named):
    with pytest.raises(ValueError, match=named):
        S4D(**{"d_model": 3, **options})


def test_a_state_of_another_layer():
    layer, x = S4D(3, 8, dtype=torch.float64), torch.randn(2, 5, 3, dtype=torch.float64)
    state = layer.initial_state(2)
    for wrong in (state.to(torch.complex64), state.real, state[:, :, :2], (state,)):
        with pytest.raises(ValueError, match=r"state must be \(2, 3, 4\) in torch.complex128"):
            layer(x, wrong)
        with pytest.raises(ValueError, match="state must be"):
            layer.step(x[:, 0], wrong)
    with pytest.raises(ValueError, match="one token for each sequence"):
        layer.step(x, state)
    for call in (lambda: layer(x[:, :0]), lambda: layer.kernel(0), lambda: layer.cost(1, 0)):
        with pytest.raises(ValueError, match="length"):
            call()

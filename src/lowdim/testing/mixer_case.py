"""Tests of every token mixer: however a sequence is split, the output is the same, and it is the paper's formula.

A mixer's test defines how to make one and its output as a formula of its parameters; it then gets all tests::

    class TestS4D(MixerCase):
        mixer_class = S4D
        features = 6
        how = {"d_state": 8}

        def reference(self, mixer, x):
            ...  # (batch, length, features) -> the output, token by token or as one dense matrix

The required interface, with `x, y (batch, length, features)`:

`mixer(x, state=None, *, attention_mask=None, return_state=False)`
    `y`, or `(y, state)` with the state after the last token. `state` is the one before the first token, None for
    `initial_state(batch)`. Tokens where `attention_mask (batch, length)` is 0 are not seen by any other, so that a row that is
    padded on the left gives the same as the unpadded row; outputs at masked positions do not matter.
`mixer.initial_state(batch)`
    The state of sequences that have not begun: a tensor, or a tuple of tensors (a named one, too) with None for absent parts.
    The first dimension of each is the batch.
`mixer.step(x_t, state)`
    `(y_t, state)` for one token, `x_t, y_t (batch, features)`. The given state is not modified; a beam search continues from it
    more than once.
`mixer.cost(batch, length, *, itemsize=4)`
    A `lowdim.linalg.Cost`.

ValueError for inputs that are not `(batch, length, features)`, for a mask that is not `(batch, length)`, and for a state of
another batch size. A mixer with its own chunked form overrides `chunked`. A check that a mixer cannot pass is switched off
by name, with the reason: `test_one_step_at_a_time_is_the_whole = None  # it looks into the future`.
"""

from __future__ import annotations

import pytest
import torch

from lowdim.testing.mixer_files import MixerFiles
from lowdim.testing.mixer_hooks import BATCH, DTYPES, LENGTH, parts

__all__ = ["MixerCase"]


class MixerCase(MixerFiles):
    """Base of a mixer's test class: define `reference`, set the attributes, override methods where a mixer differs.

    See `MixerHooks` for the attributes.
    """

    # One sequence, split in every way.

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("length", [1, 2, LENGTH])
    def test_whole_is_the_formula(self, length: int, dtype: torch.dtype) -> None:
        """In the dtype of the mixer."""
        mixer, x = self.make(dtype=dtype), self.tokens(dtype, length=length)
        y = mixer(x)
        assert y.dtype == dtype
        self.close(y, self.reference(mixer, x), dtype)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("size", [1, 3, 4, LENGTH, LENGTH + 5])
    def test_chunks_of_any_size_are_the_whole(self, size: int, dtype: torch.dtype) -> None:
        """Also of sizes that do not divide the length, and of larger ones."""
        mixer, x = self.make(dtype=dtype), self.tokens(dtype)
        self.close(self.chunked(mixer, x, size), self.reference(mixer, x), dtype)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_one_step_at_a_time_is_the_whole(self, dtype: torch.dtype) -> None:
        """The outputs and the last state."""
        mixer, x = self.make(dtype=dtype), self.tokens(dtype)
        state, out = mixer.initial_state(BATCH), []
        for t in range(LENGTH):
            y, state = mixer.step(x[:, t], state)
            assert y.shape == (BATCH, self.features)
            out.append(y)
        self.close(torch.stack(out, 1), self.reference(mixer, x), dtype)
        self.same_state(state, mixer(x, return_state=True)[1], dtype)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_two_halves_are_the_whole(self, dtype: torch.dtype) -> None:
        """For every split: the second half needs only the state after the first half."""
        mixer, x = self.make(dtype=dtype), self.tokens(dtype)
        want, last = self.reference(mixer, x), mixer(x, return_state=True)[1]
        for cut in range(1, LENGTH):
            first, state = mixer(x[:, :cut], return_state=True)
            second, end = mixer(x[:, cut:], state, return_state=True)
            self.close(torch.cat([first, second], 1), want, dtype)
            self.same_state(end, last, dtype)

    def test_a_prompt_is_continued_step_by_step(self) -> None:
        """As in generation, from a prompt of any length."""
        mixer, x = self.make(), self.tokens()
        want = self.reference(mixer, x)
        for prompt in (1, 2, 7):
            _, state = mixer(x[:, :prompt], return_state=True)
            for t in range(prompt, LENGTH):
                y, state = mixer.step(x[:, t], state)
                self.close(y, want[:, t], torch.float64)

    def test_the_initial_state_is_no_state(self) -> None:
        """The first dimension of each part is the batch."""
        mixer, x = self.make(), self.tokens()
        state = mixer.initial_state(BATCH)
        assert parts(state)
        assert all(part.shape[0] == BATCH for part in parts(state))
        self.close(mixer(x, state), self.reference(mixer, x), torch.float64)

    def test_a_state_is_left_as_it_is(self) -> None:
        """By `step` and by `forward`; a beam search continues from one state more than once."""
        mixer, x = self.make(), self.tokens()
        _, state = mixer(x[:, :4], return_state=True)
        before = [part.detach().clone() for part in parts(state)]
        mixer.step(x[:, 4], state)
        mixer(x[:, 4:], state)
        assert all(torch.equal(a, b) for a, b in zip(parts(state), before, strict=True))

    # Dependence between tokens and rows.

    def test_the_past_does_not_see_the_future(self) -> None:
        """Another token from t on changes nothing before t, and something from there on."""
        mixer, x = self.make(), self.tokens()
        y = mixer(x).detach()
        for t in (1, 6, LENGTH - 1):
            other = x.clone()
            other[:, t:] += 1
            changed = mixer(other).detach()
            self.close(changed[:, :t], y[:, :t], torch.float64)
            assert float((changed[:, t] - y[:, t]).abs().max()) > 1e-3 * float(y.abs().max())

    def test_rows_do_not_see_each_other(self) -> None:
        """Each sequence of a batch gives the same as alone."""
        mixer, x = self.make(), self.tokens()
        y = mixer(x)
        for row in range(BATCH):
            self.close(mixer(x[row : row + 1]), y[row : row + 1], torch.float64)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_padding_on_the_left_changes_nothing(self, dtype: torch.dtype) -> None:
        """Rows of different lengths: outputs, the state after them, the steps that follow, and no gradient to the padding."""
        mixer, x = self.make(dtype=dtype), self.tokens(dtype) * 3
        pads = [0, 4, LENGTH - 1]
        mask = torch.stack([(torch.arange(LENGTH) >= pad).long() for pad in pads])
        x.requires_grad_(True)
        y, state = mixer(x, attention_mask=mask, return_state=True)
        following = self.tokens(dtype, length=1, seed=1)[:, 0]
        stepped, _ = mixer.step(following, state)
        for row, pad in enumerate(pads):
            alone = torch.cat([x[row : row + 1, pad:], following[row : row + 1, None]], 1)
            want = self.reference(mixer, alone)
            self.close(y[row : row + 1, pad:], want[:, :-1], dtype)
            self.close(stepped[row], want[0, -1], dtype)
            unpadded = mixer(alone[:, :-1], return_state=True)[1]
            for got, right in zip(parts(state), parts(unpadded), strict=True):
                self.close(got[row : row + 1], right, dtype)
        (grad,) = torch.autograd.grad((y * mask[..., None]).sum(), x)
        assert not bool(grad[mask == 0].any())
        assert bool(grad[mask == 1].any())

    def test_a_mask_of_ones_is_no_mask(self) -> None:
        """Of integers or of booleans."""
        mixer, x = self.make(), self.tokens()
        for dtype in (torch.long, torch.bool):
            mask = torch.ones(BATCH, LENGTH, dtype=dtype)
            self.close(mixer(x, attention_mask=mask), self.reference(mixer, x), torch.float64)

    # Gradients.

    def test_gradients_are_those_of_the_formula(self) -> None:
        """Of the input and of every trained parameter."""
        mixer, tokens = self.make(), self.tokens()
        names, trained = zip(*((n, p) for n, p in mixer.named_parameters() if p.requires_grad), strict=True)
        found = []
        for forward in (mixer, lambda x: self.reference(mixer, x)):
            x = tokens.clone().requires_grad_(True)
            y = forward(x)
            found.append(torch.autograd.grad((y * torch.linspace(-1, 2, y.numel()).view(y.shape)).sum(), (x, *trained)))
        for name, got, want in zip(("x", *names), *found, strict=True):
            assert bool(want.any()), f"{name} gets no gradient: nothing is tested"
            self.close(got, want, "gradient")

    def test_gradients_flow_through_the_carried_state(self) -> None:
        """From outputs after the split to the tokens before it; in two halves and token by token."""
        mixer, cut = self.make(), 5
        found = []
        for way in ("formula", "halves", "steps"):
            x = self.tokens().requires_grad_(True)
            if way == "formula":
                y = self.reference(mixer, x)[:, cut:]
            else:
                _, state = mixer(x[:, :cut], return_state=True)
                if way == "halves":
                    y = mixer(x[:, cut:], state)
                else:
                    out = []
                    for t in range(cut, LENGTH):
                        y_t, state = mixer.step(x[:, t], state)
                        out.append(y_t)
                    y = torch.stack(out, 1)
            (grad,) = torch.autograd.grad((y * torch.linspace(-1, 2, y.numel()).view(y.shape)).sum(), x)
            found.append(grad[:, :cut])
        assert bool(found[0].any())
        self.close(found[1], found[0], "gradient")
        self.close(found[2], found[0], "gradient")

    # Cost and wrong input.

    def test_cost_is_its_formula(self) -> None:
        """Whole numbers; half the bytes at half the size of a number."""
        mixer = self.make()
        cost = mixer.cost(2, 16)
        assert all(type(number) is int for number in cost)
        assert cost.parameters == sum(p.numel() for p in mixer.parameters())
        assert mixer.cost(2, 16, itemsize=2).bytes_forward * 2 == cost.bytes_forward
        want = self.expected_cost(2, 16)
        if want is None:
            pytest.skip("the test gives no formula of the cost")
        assert cost == want

    def test_bad_input(self) -> None:
        """Each is named."""
        mixer, x = self.make(), self.tokens()
        for wrong in (x[..., :-1], x[0], x[None]):
            with pytest.raises(ValueError, match=str(self.features)):
                mixer(wrong)
        for mask in (torch.ones(BATCH, LENGTH - 1), torch.ones(BATCH)):
            with pytest.raises(ValueError, match="attention_mask"):
                mixer(x, attention_mask=mask)
        for batch in (1, BATCH + 1):
            with pytest.raises(ValueError, match="state"):
                mixer(x, mixer.initial_state(batch))
            with pytest.raises(ValueError, match="state"):
                mixer.step(x[:, 0], mixer.initial_state(batch))

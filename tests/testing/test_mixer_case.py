"""The shared case of token mixers: the worked example of the documentation passes it, and each wrong version fails it."""

import pytest
import torch
from planted_source import planted

from lowdim.testing.mixer_case import MixerCase

f64 = torch.float64
#: what is wrong, the text that is replaced in the example, what takes its place, the test that notices it
FAULTS = [
    (
        "the gain is squared",
        "self.gain * h, h[:, -1]) if return_state else self.gain * h",
        "self.gain**2 * h, h[:, -1]) if return_state else self.gain**2 * h",
        ("test_whole_is_the_formula", 11, f64),
    ),
    (
        "the carried state decays once too little",
        "(t[:, None] + 1) * state",
        "t[:, None] * state",
        ("test_two_halves_are_the_whole", f64),
    ),
    (
        "the carried state is left out",
        "h = h + a[:, 0, 0]",
        "h + a[:, 0, 0]",
        ("test_chunks_of_any_size_are_the_whole", 3, f64),
    ),
    ("the future is seen", ".tril(), x)", ", x)", ("test_the_past_does_not_see_the_future",)),
    ("the token itself is not seen", ".tril(), x)", ".tril(-1), x)", ("test_the_past_does_not_see_the_future",)),
    (
        "the mask is not looked at",
        "x = x.masked_fill(attention_mask[..., None] == 0, 0)",
        "pass",
        ("test_padding_on_the_left_changes_nothing", f64),
    ),
    (
        "the mask is turned around",
        "attention_mask[..., None] == 0",
        "attention_mask[..., None] == 1",
        ("test_a_mask_of_ones_is_no_mask",),
    ),
    (
        "a step forgets to decay",
        "state = self.decay.sigmoid() * state + x",
        "state = state + x",
        ("test_one_step_at_a_time_is_the_whole", f64),
    ),
    (
        "a step changes the state that it is given",
        "state = self.decay.sigmoid() * state + x",
        "state.mul_(self.decay.sigmoid()).add_(x)",
        ("test_a_state_is_left_as_it_is",),
    ),
    (
        "the state is the one before the last",
        "h[:, -1])",
        "h[:, max(h.shape[1] - 2, 0)])",
        ("test_a_prompt_is_continued_step_by_step",),
    ),
    (
        "no gradient flows through the state",
        "* state[:, None]",
        "* state[:, None].detach()",
        ("test_gradients_flow_through_the_carried_state",),
    ),
    ("rows are mixed", "htj,bjh->bth", "htj,ajh->th", ("test_rows_do_not_see_each_other",)),
    (
        "a state of another batch is broadcast",
        "if state.shape != x.shape",
        "if state.shape[-1] != x.shape[-1]",
        ("test_bad_input",),
    ),
    ("the seed is not used", 'stream(seed, "diagonal', 'stream(0, "diagonal', ("test_same_seed_same_numbers",)),
    (
        "the cost counts one multiplication less",
        "flops = 2 * batch * length * (length + 1)",
        "flops = 2 * batch * length * length",
        ("test_cost_is_its_formula",),
    ),
]


@pytest.mark.parametrize(("old", "new", "found_by"), [row[1:] for row in FAULTS], ids=[row[0] for row in FAULTS])
def test_a_wrong_mixer_fails_its_case(old, new, found_by):
    case = planted("docs/examples/adding_a_mixer.py", old, new).TestDiagonalRecurrence()
    name, *arguments = found_by
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        getattr(case, name)(*arguments)


def test_a_case_without_a_formula_cannot_run():
    class TestNothing(MixerCase):
        mixer_class = torch.nn.Identity

    with pytest.raises(TypeError, match="reference"):
        TestNothing()

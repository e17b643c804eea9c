"""The shared cases of compression: the worked example of the documentation passes, wrong versions fail by the shared case."""

import pytest
from planted_source import planted

from lowdim.testing.compress_case import CompressCase
from lowdim.testing.scheduled_compress_case import ScheduledCompressCase

EXAMPLE, SCHEDULE = "docs/examples/adding_a_compression.py", "tests/compress/test_schedule.py"

FORMULA, STEPS, END = (
    "test_each_layer_answers_as_the_formula_says",
    "test_each_step_uses_the_weight_of_its_count",
    "test_finalize_leaves_plain_layers_with_exact_zeros",
)

#: what is wrong, the text that is replaced in the example, what takes its place, the test that notices it
FAULTS = [
    ("the factors are twice as large", "(A / scale)", "(2 * A / scale)", (FORMULA, "up")),
    ("the rank is one less", "* scale, config.rank)", "* scale, config.rank - 1)", (FORMULA, "down")),
    ("inputs are not looked at", "** config.alpha\n", "** 0.0\n", (FORMULA, "up")),
    ("the scale is not undone", "(A / scale)", "(A / 1)", ("test_lossless",)),
    ("the bias is left out", "(A, B, linear.bias)", "(A, B, None)", (FORMULA, "down")),
    ("the mode is forgotten", ".take_place_of(layer)", "", ("test_model_is_otherwise_as_it_was", False)),
    (
        "tied layers are untied",
        "layers, _ = without_tied(",
        "layers, (_, _) = found, without_tied(",
        ("test_a_layer_tied_to_an_embedding_is_left_alone",),
    ),
    ("every layer is taken", "find_layers(model, config.target_modules,", "find_layers(model, None,", ("test_names_select",)),
    ("half precision is left", "(A / scale).to(linear.weight.dtype)", "(A / scale)", ("test_half_precision_model",)),
    ("another model is given out", "    return model\n", "    return nn.Sequential(model)\n", ("test_swaps_in_place",)),
]

#: the same for the gradual pruning of test_schedule.py
SCHEDULED = [
    ("the largest go", "smallest_mask(self.matrix.abs()", "smallest_mask(-self.matrix.abs()", (STEPS,)),
    ("a step late", "self.finished / self.total_steps)", "max(0, self.finished - 1) / self.total_steps)", (STEPS,)),
    ("too few go at the end", "min(1.0, self.finished", "min(0.9, self.finished", (END,)),
    ("nothing goes", "min(1.0, self.finished / self.total_steps)", "0", (END,)),
    (
        "the length is not described",
        '"total_steps": self.total_steps}',
        '"total_steps": 60}',
        ("test_it_is_rebuilt_in_the_middle_of_its_schedule",),
    ),
    (
        "the mask forgets Conv1D's layout",
        "smallest_mask(self.matrix.abs()",
        "smallest_mask(self.weight.abs()",
        ("test_finalize_gives_transposed_layers_back",),
    ),
]

CAUGHT = (AssertionError, pytest.fail.Exception, RuntimeError)


@pytest.mark.parametrize(("old", "new", "found_by"), [row[1:] for row in FAULTS], ids=[row[0] for row in FAULTS])
def test_a_wrong_compression_fails_its_case(old, new, found_by):
    name, *arguments = found_by
    with pytest.raises(CAUGHT):
        getattr(planted(EXAMPLE, old, new).TestASVD(), name)(*arguments)


@pytest.mark.parametrize(("old", "new", "found_by"), [row[1:] for row in SCHEDULED], ids=[row[0] for row in SCHEDULED])
def test_a_wrong_schedule_fails_its_case(old, new, found_by):
    name, *arguments = found_by
    with pytest.raises(CAUGHT):
        getattr(planted(SCHEDULE, old, new).TestGradual(), name)(*arguments)


@pytest.mark.parametrize(("base", "lacking"), [(CompressCase, "expected"), (ScheduledCompressCase, "effective")])
def test_a_case_without_a_formula_cannot_run(base, lacking):
    class TestNothing(base):
        def compress(self, model, batches, **options):
            return model

    with pytest.raises(TypeError, match=lacking):
        TestNothing()


def test_the_example_is_about_sixty_lines():
    from planted_source import ROOT

    lines = [line for line in (ROOT / EXAMPLE).read_text(encoding="utf-8").splitlines() if line.strip()]
    assert 40 <= len(lines) <= 80

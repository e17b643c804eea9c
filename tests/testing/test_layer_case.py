"""The shared case of structured layers: the worked example of the documentation passes it, wrong versions fail it."""

import pytest
import torch
from planted_source import planted

from lowdim.testing.layer_case import LayerCase

#: what is wrong, the text that is replaced in the example, what takes its place, the test that notices it
FAULTS = [
    (
        "the product is twice as large",
        "(rows @ self.blocks.mT)",
        "(2 * rows @ self.blocks.mT)",
        ("test_forward_is_the_dense_product", True),
    ),
    (
        "product and dense weight agree on a wrong scale",
        "return torch.block_diag(*self.blocks)",
        "return 2 * torch.block_diag(*self.blocks)",
        ("test_dense_weight_is_the_formula",),
    ),
    (
        "the blocks are in another order",
        "return torch.block_diag(*self.blocks)",
        "return torch.block_diag(*self.blocks.flip(0))",
        ("test_to_linear_is_the_same_function", torch.float64),
    ),
    (
        "the bias is left out",
        "return y if self.bias is None",
        "return y if True",
        ("test_gradients_are_those_of_the_dense_product",),
    ),
    (
        "blocks of a trained layer are taken from the first columns",
        "whole[b, :, b]",
        "whole[b, :, 0]",
        ("test_from_linear_keeps_what_it_can",),
    ),
    (
        "the trained bias is shared",
        "return layer.with_rest_of(linear)",
        "layer.bias = linear.bias\n        return layer.train(linear.training)",
        ("test_from_linear_leaves_the_given_layer", True, torch.float32),
    ),
    (
        "the generator is not used",
        "shape[2] ** -0.5, generator",
        "shape[2] ** -0.5, None",
        ("test_same_generator_same_numbers",),
    ),
    (
        "the cost forgets the blocks' number",
        "(self.blocks.numel(), self.in_features",
        "(self.blocks[0].numel(), self.in_features",
        ("test_cost_is_what_runs",),
    ),
    ("NaN is let in", "if not bool(weight.isfinite().all())", "if False", ("test_from_linear_refuses_nan",)),
]


@pytest.mark.parametrize(("old", "new", "found_by"), [row[1:] for row in FAULTS], ids=[row[0] for row in FAULTS])
def test_a_wrong_layer_fails_its_case(old, new, found_by):
    case = planted("docs/examples/adding_a_layer.py", old, new).TestBlockDiagonal()
    name, *arguments = found_by
    with pytest.raises((AssertionError, pytest.fail.Exception, RuntimeError)):
        getattr(case, name)(*arguments)


def test_a_case_without_a_formula_cannot_run():
    class TestNothing(LayerCase):
        layer_class = torch.nn.Linear

    with pytest.raises(TypeError, match="dense"):
        TestNothing()

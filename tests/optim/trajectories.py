"""How far a run on a vector's gradients may be from the authors' weights, for the tests of optimizers."""

import torch


def relative_to_update(got, want, start):
    """The largest error of a step's weights, over how far the weights have moved."""
    return max(float((g - w).norm() / (w - start).norm()) for g, w in zip(got, want, strict=True))


def roundings_apart(got, want, dtype):
    """The largest error, in last bits that `dtype` gives the largest of the weights."""
    return float((got.double() - want).abs().max()) / (torch.finfo(dtype).eps * float(want.abs().max()))

"""Reproductions in their short form: they run, and reach every row and every check."""

import importlib
import json

import pytest

from lowdim.errors import DataError
from lowdim.reproduce import Context

#: slug: rows and checks of the short form.
SIZES = {
    "batch-lr": (7, 6),
    "dcd": (12, 7),
    "drs": (3, 5),
    "generalization-dynamics": (8, 10),
    "intrinsic-dimension": (5, 6),
    "intruders": (6, 3),
    "linf-regression": (20, 9),
    "matrix-completion": (6, 6),
    "mrl": (6, 6),
}
DIGITS = ("batch-lr", "generalization-dynamics", "intrinsic-dimension", "intruders", "matrix-completion")
IMAGES = ("drs", "mrl")  # Debian's package dataset-fashion-mnist


@pytest.mark.slow
@pytest.mark.parametrize("slug", SIZES)
def test_the_reproduction_runs(slug):
    if slug in DIGITS:
        pytest.importorskip("sklearn", reason="digits are scikit-learn's")
    run = importlib.import_module(f"lowdim.reproduce.{slug.replace('-', '_')}").run
    try:
        outcome = run(Context(quick=True))
    except DataError as error:
        if slug not in IMAGES:
            raise
        pytest.skip(str(error))
    assert outcome.slug == slug
    assert (len(outcome.rows), len(outcome.checks)) == SIZES[slug]
    json.dumps(outcome.to_dict(), allow_nan=False)

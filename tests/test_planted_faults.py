"""Wrong formulas are found by the shared cases alone: each fault is planted in a copy of the package.

`make mutants` plants the whole table, and runs for each the tests that should catch it.
"""

import collections

import pytest

from mutants import shared
from mutants.planting import CAUGHT, ROOT, SURVIVED, Copy
from mutants.run import FAULTS


def name(fault):
    return fault.what


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    with Copy(tmp_path_factory.mktemp("planted")) as made:
        yield made


@pytest.mark.slow
@pytest.mark.parametrize("fault", shared.FAULTS, ids=name)
def test_the_shared_case_alone_catches(fault, copied):
    assert fault.tests.shared
    with copied.planted(fault):
        outcome = copied.run(fault.tests, timeout=240)
    assert outcome.status == CAUGHT, outcome.output[-3000:]
    assert outcome.failed


@pytest.mark.slow
def test_without_a_fault_the_copy_passes_and_is_what_is_tested(copied):
    fault = shared.FAULTS[0]
    there, here = copied.source / "lowdim" / fault.file, ROOT / "src" / "lowdim" / fault.file
    with copied.planted(fault):
        assert there.read_text() == here.read_text().replace(fault.old, fault.new)
    assert there.read_bytes() == here.read_bytes()
    assert copied.run(fault.tests, timeout=240).status == SURVIVED


@pytest.mark.parametrize("fault", FAULTS, ids=name)
def test_the_fault_can_be_planted(fault):
    assert fault.line() > 0
    assert fault.old != fault.new
    assert all((ROOT / "tests" / node.split("::")[0]).exists() for node in fault.tests.nodes)


def test_the_table_is_large_and_spread_over_the_package():
    assert len(FAULTS) >= 60
    assert len({fault.what for fault in FAULTS}) == len(FAULTS)
    counts = collections.Counter(fault.file.split("/")[0] for fault in FAULTS)
    families = ("adapters", "optim", "layers", "compress", "represent", "diagnose", "solve")
    assert all(counts[part] >= 4 for part in families)
    assert all(
        counts[part] for part in ("linalg", "methods", "train", "comparison", "plan", "calibrate", "export.py", "files.py")
    )

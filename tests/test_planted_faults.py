"""Wrong formulas are found by the shared cases alone: each fault is planted in a copy of the package."""

import pytest

from mutants import shared
from mutants.planting import CAUGHT, ROOT, SURVIVED, Copy


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    return Copy(tmp_path_factory.mktemp("planted"))


@pytest.mark.slow
@pytest.mark.parametrize("fault", shared.FAULTS, ids=lambda fault: fault.what)
def test_the_shared_case_alone_catches(fault, copied):
    assert fault.tests.shared
    with copied.planted(fault):
        outcome = copied.run(fault.tests, timeout=120)
    assert outcome.status == CAUGHT, outcome.output[-3000:]
    assert outcome.failed.startswith("tests/")


@pytest.mark.slow
def test_without_a_fault_the_copy_passes_and_is_what_is_tested(copied):
    fault = shared.FAULTS[0]
    before = (copied.source / "lowdim" / fault.file).read_bytes()
    with copied.planted(fault):
        pass
    assert (copied.source / "lowdim" / fault.file).read_bytes() == before == (ROOT / "src/lowdim" / fault.file).read_bytes()
    assert copied.run(fault.tests, timeout=120).status == SURVIVED


@pytest.mark.parametrize("fault", shared.FAULTS, ids=lambda fault: fault.what)
def test_the_fault_can_be_planted(fault):
    assert fault.line() > 0
    assert fault.old != fault.new
    assert all((ROOT / "tests" / node.split("::")[0]).is_file() for node in fault.tests.nodes)

"""Every optimizer, layer and compression in two gloo processes (FSDP2) against one; checkpoints change the number of processes.

The subjects stand in the test files of the systems, in dictionaries named SHARDED; here one pair of processes serves all.
"""

import importlib
import sys
from pathlib import Path

import pytest

from lowdim.testing.processes import in_processes
from lowdim.testing.sharded_case import check_sharded, sharded_numbers

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
FOLDERS = ("optim", "layers", "compress")
for _folder in FOLDERS:
    sys.path.insert(0, str(HERE / _folder))
MODULES = sorted(
    path.stem
    for folder in FOLDERS
    for path in (HERE / folder).glob("test_*.py")
    if "SHARDED = {" in path.read_text(encoding="utf-8")
)
NAMES = [(module, key) for module in MODULES for key in importlib.import_module(module).SHARDED]


@pytest.fixture(scope="module")
def numbers():
    return in_processes(sharded_numbers, 2, NAMES)


@pytest.mark.parametrize(("module", "key"), NAMES, ids=[key for _, key in NAMES])
def test_two_processes_equal_one(numbers, module, key):
    check_sharded(importlib.import_module(module).SHARDED[key], numbers[key])

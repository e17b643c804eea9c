"""The adapter that docs/adding-a-method.md writes goes through the shared case."""

import sys
import types

import pytest
import torch

from lowdim.adapters.core import method as methods
from lowdim.testing.adapter_case import AdapterCase
from snippets import ROOT, blocks

(BLOCK,) = blocks(ROOT / "docs" / "adding-a-method.md", "python")
NAME = "written_in_the_docs"


def _module() -> types.ModuleType:
    known = dict(methods._REGISTRY)
    module = types.ModuleType(NAME)
    sys.modules[NAME] = module  # a dataclass looks its own module up
    exec(compile("\n" * BLOCK.line + BLOCK.body, str(BLOCK.page), "exec"), module.__dict__)
    methods._REGISTRY.clear()
    methods._REGISTRY.update(known)
    return module


KronA = _module().KronA


def test_it_is_about_a_hundred_lines():
    lines = [line for line in BLOCK.body.splitlines() if line.strip()]
    assert 50 <= len(lines) <= 110


class TestKronA(AdapterCase):
    exact_in_peft = has_factors = False  # the update has full rank
    alpha = 1.5

    @pytest.fixture(autouse=True)
    def _registered(self):
        methods._REGISTRY["KronA"] = KronA
        yield
        methods._REGISTRY.pop("KronA")

    def method(self, **changes):
        changes.pop("rank", None)  # it has none
        return KronA(**{"blocks": 3, "alpha": self.alpha, **changes})

    def dense(self, update):
        return self.alpha * torch.kron(update.P, update.Q)

    def start(self, weight, stats):
        return {"P": 0.0}

    def test_errors_name_the_layer(self):
        for bad in (0, -1, True, 1.5):
            with pytest.raises(ValueError, match="blocks"):
                self.method(blocks=bad)
        with pytest.raises(ValueError, match="dropout"):
            self.method(dropout=1.0)

    @pytest.mark.skip(reason="its module is a docs page, which no other process can import")
    def test_another_process_loads_the_same_bits(self, tmp_path): ...

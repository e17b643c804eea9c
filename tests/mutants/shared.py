"""Faults that a shared case must catch by itself, without vectors and without the tests of the system's own file."""

from mutants.planting import Fault, Tests

FAULTS = [
    Fault(
        "LoRA's scale is alpha, not alpha / rank",
        "adapters/lora.py",
        "scaling = self.alpha / (math.sqrt(rank) if self.rank_stabilized else rank)",
        "scaling = self.alpha",
        Tests(("adapters/test_lora.py::TestLoRA",), "formula", shared=True),
    ),
]

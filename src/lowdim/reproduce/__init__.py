"""Each paper's claim as a command: run the experiment, print the claim, the numbers and a verdict.

A reproduction is a module `lowdim.reproduce.SLUG` with `run(context) -> Outcome`; `lowdim reproduce SLUG` finds it
through the catalogue.
"""

from lowdim.reproduce.settings.outcome import Check, Context, Outcome

__all__ = ["Check", "Context", "Outcome"]

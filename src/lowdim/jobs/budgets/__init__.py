"""From a budget to the settings of a compression: which layer gets how much of it.

| module | systems | what the budget counts |
| --- | --- | --- |
| `low_rank` | LoRD, PELA, WeLore | bytes of the model's tensors in a file |
| `codes` | LR²VQ | the same |
| `sparsity` | WINA | bytes of the sparse layers' weights that a token reads |
| `cache` | MatryoshkaKV | cached bytes per token |
"""

from lowdim.jobs.budgets.budget import Budget, Fitted
from lowdim.jobs.budgets.fitting import check_budget_options, fit_budget, looks_at_samples
from lowdim.jobs.budgets.sparsity import sparse_layers

__all__ = ["Budget", "Fitted", "check_budget_options", "fit_budget", "looks_at_samples", "sparse_layers"]

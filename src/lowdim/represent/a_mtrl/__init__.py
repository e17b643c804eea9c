"""A-MTRL: source samples go to the tasks that the target is a sparse combination of."""

from lowdim.represent.a_mtrl.active import ActiveMultiTask, ActiveResult
from lowdim.represent.a_mtrl.relevance import allocate_samples, task_relevance
from lowdim.represent.a_mtrl.representation import SharedLinearRepresentation

__all__ = ["ActiveMultiTask", "ActiveResult", "SharedLinearRepresentation", "allocate_samples", "task_relevance"]

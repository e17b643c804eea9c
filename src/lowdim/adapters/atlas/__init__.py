"""aTLAS: scaled task vectors, with one coefficient for each block of parameters."""

from lowdim.adapters.atlas.method import ATLAS, ATLASAdapted
from lowdim.adapters.atlas.task_vectors import TaskVector, task_vector

__all__ = ["ATLAS", "ATLASAdapted", "TaskVector", "task_vector"]

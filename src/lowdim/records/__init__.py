"""The records of runs, comparisons and compressions: dataclasses that write their JSON files and read them again."""

from lowdim.records.base import Record, claim
from lowdim.records.comparison import (
    ComparisonRecord,
    LossCurve,
    MethodRecord,
    MetricRecord,
    ModelRecord,
    Trial,
    WinnerRecord,
    metric_title,
)
from lowdim.records.compression import CompressionRecord
from lowdim.records.run import RUN, ComparedRun, RunRecord

__all__ = [
    "RUN",
    "ComparedRun",
    "ComparisonRecord",
    "CompressionRecord",
    "LossCurve",
    "MethodRecord",
    "MetricRecord",
    "ModelRecord",
    "Record",
    "RunRecord",
    "Trial",
    "WinnerRecord",
    "claim",
    "metric_title",
]

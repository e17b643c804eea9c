"""The records of runs, comparisons and compressions: dataclasses that write their JSON files and read them again."""

from lowdim.records.base import Record, claim
from lowdim.records.comparison import (
    ComparisonRecord,
    JudgementRecord,
    LossCurve,
    MethodRecord,
    MetricRecord,
    ModelRecord,
    RankPair,
    RanksRecord,
    SampleRecord,
    SearchRecord,
    Trial,
    VisitRecord,
    WinnerRecord,
    metric_title,
)
from lowdim.records.compression import CompressionRecord
from lowdim.records.differences import difference_text, in_points, with_error
from lowdim.records.families import FamiliesRecord, FamilyRun, LevelRecord
from lowdim.records.pipeline import PipelineRecord, StepRecord
from lowdim.records.rates import MeasuredRate, MeasuredRates, RatesRecord
from lowdim.records.run import RUN, ComparedRun, RunRecord, WatchRecord

__all__ = [
    "RUN",
    "ComparedRun",
    "ComparisonRecord",
    "CompressionRecord",
    "FamiliesRecord",
    "FamilyRun",
    "JudgementRecord",
    "LevelRecord",
    "LossCurve",
    "MeasuredRate",
    "MeasuredRates",
    "MethodRecord",
    "MetricRecord",
    "ModelRecord",
    "PipelineRecord",
    "RankPair",
    "RanksRecord",
    "RatesRecord",
    "Record",
    "RunRecord",
    "SampleRecord",
    "SearchRecord",
    "StepRecord",
    "Trial",
    "VisitRecord",
    "WatchRecord",
    "WinnerRecord",
    "claim",
    "difference_text",
    "in_points",
    "metric_title",
    "with_error",
]

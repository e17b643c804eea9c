"""Compressions in several steps, each measured (`lowdim compress --steps`), and compared (`lowdim compare --compress`).

| module | what it knows |
| --- | --- |
| `recipe` | the YAML file: steps, their fields, errors with key and line |
| `subject` | the model, its task and its samples; the model again from a folder |
| `similarity` | the task of sentence encoders: cosines against scores of pairs |
| `steps` | what each kind of step does to a model |
| `measuring` | score with interval, bytes, cache, tokens a second, error by block |
| `families` | methods at equal bytes, after equal tuning, judged |
| `run` | the steps in order, their records and checkpoints, and how a run goes on |
"""

from lowdim.pipeline.families import FamilySettings, compare_families
from lowdim.pipeline.recipe import PipelineRecipe, load_pipeline
from lowdim.pipeline.run import run_pipeline

__all__ = ["FamilySettings", "PipelineRecipe", "compare_families", "load_pipeline", "run_pipeline"]

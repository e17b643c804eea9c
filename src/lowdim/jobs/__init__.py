"""The work of each command, callable from Python: settings in, result out, nothing printed.

from lowdim.jobs import CompressSettings, compress

compress(CompressSettings(model="my-model", data=("notes.txt",), out="smaller", method="welore", options={"target": 0.4}))
"""

from lowdim.jobs.compare import compare_settings
from lowdim.jobs.compress import CompressOutcome, CompressSettings, compress
from lowdim.jobs.diagnose import DiagnoseSettings, diagnose
from lowdim.jobs.diagnosis import Diagnosis, DiagnosisSettings, diagnose_all, write_diagnosis
from lowdim.jobs.export import ExportSettings, export
from lowdim.jobs.fitted_recipes import write_recipes
from lowdim.jobs.index_check import IndexCheckSettings, index_check
from lowdim.jobs.options import Option, options_of, parse_options
from lowdim.jobs.plan import FitOutcome, PlanOutcome, PlanSettings, fit_plan, plan, touched_layers
from lowdim.jobs.plan_rates import plan_rates
from lowdim.jobs.report import report
from lowdim.jobs.reproduce import Reproduction, reproduce
from lowdim.jobs.sizes import SizesOutcome, SizesSettings, parse_numbers, sizes
from lowdim.jobs.systems import Compressor, Diagnostic, compressor, diagnostic

__all__ = [
    "CompressOutcome",
    "CompressSettings",
    "Compressor",
    "DiagnoseSettings",
    "Diagnosis",
    "DiagnosisSettings",
    "Diagnostic",
    "ExportSettings",
    "FitOutcome",
    "IndexCheckSettings",
    "Option",
    "PlanOutcome",
    "PlanSettings",
    "Reproduction",
    "SizesOutcome",
    "SizesSettings",
    "compare_settings",
    "compress",
    "compressor",
    "diagnose",
    "diagnose_all",
    "diagnostic",
    "export",
    "fit_plan",
    "index_check",
    "options_of",
    "parse_numbers",
    "parse_options",
    "plan",
    "plan_rates",
    "report",
    "reproduce",
    "sizes",
    "touched_layers",
    "write_diagnosis",
    "write_recipes",
]

"""The work of each command, callable from Python: settings in, result out, nothing printed.

from lowdim.jobs import CompressSettings, compress

compress(CompressSettings(model="my-model", data=("notes.txt",), out="smaller", method="welore", options={"target": 0.4}))
"""

from lowdim.jobs.compare import compare_settings
from lowdim.jobs.compress import CompressOutcome, CompressSettings, compress
from lowdim.jobs.diagnose import DiagnoseSettings, diagnose
from lowdim.jobs.export import ExportSettings, export
from lowdim.jobs.options import Option, options_of, parse_options
from lowdim.jobs.plan import PlanOutcome, PlanSettings, plan, touched_layers
from lowdim.jobs.report import report
from lowdim.jobs.reproduce import Reproduction, reproduce
from lowdim.jobs.systems import Compressor, Diagnostic, compressor, diagnostic

__all__ = [
    "CompressOutcome",
    "CompressSettings",
    "Compressor",
    "DiagnoseSettings",
    "Diagnostic",
    "ExportSettings",
    "Option",
    "PlanOutcome",
    "PlanSettings",
    "Reproduction",
    "compare_settings",
    "compress",
    "compressor",
    "diagnose",
    "diagnostic",
    "export",
    "options_of",
    "parse_options",
    "plan",
    "report",
    "reproduce",
    "touched_layers",
]

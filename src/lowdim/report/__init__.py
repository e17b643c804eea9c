"""One self-contained HTML page per comparison or run, and the same table for the terminal.

A page needs nothing but its own file: no network, no library, no fonts. It reads only the comparison's record, so
any saved record can be drawn again by a later version.
"""

from lowdim.report.diagnosis import render_diagnosis, write_diagnosis_page
from lowdim.report.families import render_families, write_families
from lowdim.report.fragment import fragment
from lowdim.report.page import render, write
from lowdim.report.pipeline import render_pipeline, write_pipeline
from lowdim.report.replacement import render_replacement, write_replacement
from lowdim.report.single import render_run, write_run
from lowdim.report.sizes import render_sizes, write_sizes
from lowdim.report.terminal import summary, table

__all__ = [
    "fragment",
    "render",
    "render_diagnosis",
    "render_families",
    "render_pipeline",
    "render_replacement",
    "render_run",
    "render_sizes",
    "summary",
    "table",
    "write",
    "write_diagnosis_page",
    "write_families",
    "write_pipeline",
    "write_replacement",
    "write_run",
    "write_sizes",
]

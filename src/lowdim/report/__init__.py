"""One self-contained HTML page per comparison or run, and the same table for the terminal.

A page needs nothing but its own file: no network, no library, no fonts. It reads only the comparison's record, so
any saved record can be drawn again by a later version.
"""

from lowdim.report.page import render, write
from lowdim.report.single import render_run, write_run
from lowdim.report.terminal import table

__all__ = ["render", "render_run", "table", "write", "write_run"]

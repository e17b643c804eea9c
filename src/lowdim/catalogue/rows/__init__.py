"""The rows of the catalogue: one module per family, one `Entry` per system.

A system is added to its family's module and nowhere else; `ROWS` puts all of them in order.
"""

from lowdim.catalogue.rows import adapters, compress, diagnose, layers, optim, represent, solve, train

ROWS = tuple(
    sorted(
        (
            *adapters.ROWS,
            *optim.ROWS,
            *layers.ROWS,
            *compress.ROWS,
            *represent.ROWS,
            *diagnose.ROWS,
            *solve.ROWS,
            *train.ROWS,
        ),
        key=lambda row: row.number,
    )
)

"""Systems that solve: linear systems, regression, matrix completion."""

from lowdim.catalogue.entry import Entry

ROWS = (
    Entry(
        number=22,
        slug="linf-regression",
        name="l∞ regression",
        paper="A Nearly-Optimal Bound for Fast Regression with l_infinity Guarantee",
        arxiv="2302.00248",
        claim="A dense sketch of ε⁻²·d·log³(n/δ) rows bounds each coordinate's error, which sparse sketches cannot.",
        target="linf_lstsq",
    ),
    Entry(
        number=25,
        slug="matrix-completion",
        name="Matrix completion",
        paper="Low Rank Matrix Completion via Robust Alternating Minimization in Nearly Linear Time",
        arxiv="2302.11068",
        claim="Alternating minimisation with inexact half steps: about |Ω|·k time instead of |Ω|·k², with no more samples.",
        target="complete_matrix",
    ),
    Entry(
        number=34,
        slug="dcd",
        name="Deep conjugate directions",
        paper="A Deep Conjugate Direction Method for Iteratively Solving Linear Systems",
        arxiv="2205.10763",
        claim="Learned search directions solve 3-D Poisson with up to 256³ unknowns in a few tens of iterations.",
        target="solve_dcd",
    ),
)

"""Code shared by solvers."""

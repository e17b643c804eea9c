"""SaRA: only the entries of smallest magnitude are trained."""

from lowdim.adapters.sara.method import SaRA

__all__ = ["SaRA"]

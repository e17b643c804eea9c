"""SaRA: training the entries of smallest magnitude, and no others."""

from lowdim.adapters.sara.method import SaRA

__all__ = ["SaRA"]

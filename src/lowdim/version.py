"""The version of lowdim, for records and files; `lowdim.__version__` is the same."""

__version__ = "0.1.0"

"""`python -m lowdim` is the command line."""

from lowdim.cli import main

main()

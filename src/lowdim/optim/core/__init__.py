"""Shared by all optimizers: parts, the driver that runs them, parameter groups, sharded and 8-bit states."""

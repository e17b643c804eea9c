"""What optimizers share: parts, the driver that runs them, parameter groups, sharded and 8-bit states."""

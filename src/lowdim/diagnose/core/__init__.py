"""What diagnostics share: reading weights, and subspaces."""

"""FCCov-Net: nonlinear sufficient dimension reduction for responses in a metric space."""

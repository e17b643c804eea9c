"""GBWBN: batch normalisation of symmetric positive definite matrices under a generalised Bures-Wasserstein metric."""

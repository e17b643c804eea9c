"""Learning rates as a function of the batch size, from the curvature of the loss."""

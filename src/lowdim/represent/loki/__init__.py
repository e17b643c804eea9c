"""loki: predictions of a trained classifier as Fréchet means over distances between labels, so that unseen classes occur."""

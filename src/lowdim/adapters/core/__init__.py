"""What adapters share: the layer around a frozen weight, updates, attaching, merging, files."""

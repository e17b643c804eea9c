"""High-dimensional dynamics of the generalisation error: theory, exact flow on given data, and features of a model."""

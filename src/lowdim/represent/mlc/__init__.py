"""MLC: clusters and a representation as a union of subspaces, learned together without labels."""

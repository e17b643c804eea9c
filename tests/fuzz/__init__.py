"""Damaged files: whatever stands in a file that lowdim reads, the answer is right or is one typed error."""

"""What systems of `lowdim.represent` share."""

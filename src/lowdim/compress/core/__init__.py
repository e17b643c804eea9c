"""What compressions share: reports, and reading compressed models."""

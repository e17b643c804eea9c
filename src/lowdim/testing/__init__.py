"""The shared test cases that every row of the catalogue passes; for our systems and those of third parties."""

"""The shared test cases that every row of the catalogue passes; ours and third parties' systems alike."""

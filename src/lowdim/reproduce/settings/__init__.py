"""What several experiments share: data, models, timing, outcomes."""

"""What a ladder compares: one file a paper, its rows, rungs and claims as data."""

"""The ladder (docs/ladder/plan.md) on one GPU, in a single process: a foundation, rows trained
in memory, scores, a table.
"""

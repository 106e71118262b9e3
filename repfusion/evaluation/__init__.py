"""A checkpoint -> images that suites ask for -> a judge's answers -> scores. `checkpoints.py` makes an
evaluation, `record.py` reads it.
"""

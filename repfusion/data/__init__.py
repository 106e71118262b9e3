"""Columns of WebDataset tars -> batches: what lies where, which sample each position reads, and reading
ahead.
"""

"""Workflows on Ray: image-text data in; WebDataset shards, latents and features, training, evaluation and
a report out.
"""

"""Blocks of the DiT: one file a way in which a condition enters."""

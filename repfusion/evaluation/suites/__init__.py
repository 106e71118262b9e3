"""Evaluation suites, a file each; `build.py` makes one from its configuration."""

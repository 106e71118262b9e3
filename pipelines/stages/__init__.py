"""The stages of a workflow: one file a stage, and `build.py`, which makes them of a configuration."""

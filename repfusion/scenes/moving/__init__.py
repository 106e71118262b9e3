"""Clips of the embedded world: what moves, changes or appears, its captions, edits and exact checks."""

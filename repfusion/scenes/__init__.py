"""The embedded world: seeded images of coloured shapes, captions over GenEval's six tasks, and an exact
detector.
"""

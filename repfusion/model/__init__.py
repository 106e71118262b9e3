"""Denoisers, and the text-to-image model that holds everything of one training."""

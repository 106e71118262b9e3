"""Dialogues of texts and images with a checkpoint of GILL (arXiv 2305.17216)."""

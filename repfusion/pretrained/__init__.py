"""Folders of other people's models: what they say of themselves, and their weights, strictly."""

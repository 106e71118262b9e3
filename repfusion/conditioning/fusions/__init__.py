"""Fusions: how hidden states of a frozen language model's layers become what the DiT sees."""

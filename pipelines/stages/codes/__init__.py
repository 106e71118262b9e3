"""Curated images -> a tokenizer, and a column of its codes."""

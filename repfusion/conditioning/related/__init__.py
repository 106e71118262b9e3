"""Related systems: other ways to join a frozen language model with a generator, one file a system."""

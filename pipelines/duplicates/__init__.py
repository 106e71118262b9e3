"""Which images repeat an earlier one, over all shards: exact bytes and perceptual hashes."""

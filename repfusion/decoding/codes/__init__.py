"""Own image shards -> the tokenizer of images into discrete codes."""

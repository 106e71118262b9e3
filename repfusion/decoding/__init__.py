"""Own image shards -> the decoder of an encoder."""

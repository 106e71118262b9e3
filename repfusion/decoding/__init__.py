"""Own image shards -> the RAE decoder of an encoder."""

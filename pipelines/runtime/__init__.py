"""Ray: the session, and the pool of actors over shards."""

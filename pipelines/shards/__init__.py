"""Folders on local disk or behind a URL, and the shards, sidecars and manifests in them."""

"""How each kind of cluster starts, takes jobs and ends."""

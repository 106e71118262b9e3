"""Text for people: without secrets, and nothing in it that a terminal would obey."""

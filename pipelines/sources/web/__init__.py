"""Addresses of the web -> bytes, with limits on what is asked, how often and where."""

"""The files of a workflow -> pages and charts."""

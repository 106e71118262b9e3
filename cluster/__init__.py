"""One command from nothing to a Ray cluster that runs the project's workflows: `python -m cluster`."""

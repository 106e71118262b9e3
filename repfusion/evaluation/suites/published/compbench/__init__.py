"""T2I-CompBench++ (arXiv 2307.06350): what its prompts ask for, and what the published scorers make of it."""

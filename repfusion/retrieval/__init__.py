"""Images that are found by what is said of them, as GILL (arXiv 2305.17216) learns to."""

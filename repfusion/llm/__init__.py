"""Language models, with or without eyes: a Hugging Face folder -> tokens, hidden states, reading on."""

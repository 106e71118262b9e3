"""Images <-> rows of discrete codes: a tokenizer of two branches, what they mean and what the pixels show."""

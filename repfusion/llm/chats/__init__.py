"""Chats with a language model: system prompt, images and an instruction -> tokens, hidden states, an answer."""

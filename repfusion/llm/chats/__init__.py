"""Chats with a language model: system prompt, images and an instruction -> tokens, states, an answer."""

"""Scenes -> the small foundation shipped in `repfusion/weights/`: vision tower, LLaVA, its
language-only twin, tokenizer, RAE decoder, base.
"""

"""Scenes -> the small foundation shipped in `weights/`: vision tower, LLaVA, its language-only twin,
tokenizer, RAE decoder, base.
"""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"

"""A tiny foundation, and a folder in which one whole call has run."""

from pathlib import Path

import pytest

from pipelines.ladder.science.session import Asked, run_call
from repfusion.foundation.dialogues import train_tokenizer

FOUNDATION = """
num_scenes: 24
texts_per_scene: 3
image_size: 32
patch_size: 8
vision_width: 32
vision_layers: 2
vision_heads: 1
text_width: 32
text_layers: 1
text_heads: 1
decoder_width: 32
decoder_depth: 1
decoder_heads: 1
large_width: 64
large_layers: 3
large_heads: 2
save_every_sec: 1000
perception: &short {num_steps: 3, batch_size: 6}
judgement: *short
polish: *short
noise_taught: *short
language: *short
large: *short
vae: *short
"""
PLAN = (
    *("num_scenes=30", "batch_size=8", "num_steps=6", "num_paired=2", "suite.num_prompts=6"),
    *("dit.hidden_size=32", "dit.depth=1", "dit.num_heads=1", "sampler.num_steps=1"),
)


@pytest.fixture(scope="session")
def foundation_yaml(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("science") / "tiny.yaml"
    path.write_text(FOUNDATION)
    return path


@pytest.fixture(scope="session")
def asked(foundation_yaml, tmp_path_factory) -> Asked:
    """One whole call of one row; its tokenizer read fewer texts than usual."""
    out = tmp_path_factory.mktemp("out")
    train_tokenizer(out / "foundation" / "llava", num_scenes=300)
    asked = Asked(out, 1000.0, foundation_yaml, PLAN, ("repfusion",), (0,), num_measured=2)
    assert run_call(asked, lambda line: None)
    return asked

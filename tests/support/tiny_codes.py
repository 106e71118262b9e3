"""A tiny tokenizer of images into codes on the tower of `make_foundation`: 4 semantic and 16 pixel codes."""

from pathlib import Path

import numpy as np
import torch
from tiny_training import npy, write_tar

from repfusion.codes.column import TOKENIZER_FILE, TokenizerMark
from repfusion.codes.network import BranchesConfig, DualTokenizer, TokenizerConfig
from repfusion.codes.pixel import ConvConfig, PixelConfig
from repfusion.codes.semantic import SemanticConfig
from repfusion.codes.tokenizer import read_folder, save_tokenizer
from repfusion.data.columns import scan_tar
from repfusion.files import weights_digest
from repfusion.latents.geometry import latent_geometry
from repfusion.latents.load import EncoderConfig

NUM_SEMANTIC, NUM_PIXEL = 24, 40
BRANCHES = BranchesConfig(
    semantic=SemanticConfig(num_codes=NUM_SEMANTIC, width=6, hidden_size=16, depth=1, num_heads=2),
    pixel=PixelConfig(num_codes=NUM_PIXEL, width=5, dropped_share=0.5),
    conv=ConvConfig(channels=8, multipliers=(1, 1, 1, 1), depth=1),
)


def tiny_network(tower: Path, branches: BranchesConfig = BRANCHES, seed: int = 0) -> DualTokenizer:
    """A network of fresh weights on a tower's features."""
    image_size, grid, feature_dim = latent_geometry(tower)
    fields = {name: getattr(branches, name) for name in BranchesConfig.model_fields}
    config = TokenizerConfig(**fields, image_size=image_size, feature_dim=feature_dim, feature_grid=grid)
    torch.manual_seed(seed)
    return DualTokenizer(config)


def write_tokenizer(folder: Path, tower: Path, branches: BranchesConfig = BRANCHES, seed: int = 0) -> Path:
    """The folder of a tokenizer of random weights."""
    network = tiny_network(tower, branches, seed)
    save_tokenizer(folder, network, EncoderConfig(path=tower), weights_digest(tower), torch.float32)
    return folder


def make_codes(folder: Path, columns: Path, tokenizer: Path) -> Path:
    """A column of codes, each sample's own, beside the columns of `make_columns`."""
    last = read_folder(tokenizer).network.streams[-1]
    for shard in sorted((columns / "curate").glob("*.tar")):
        keys = dict.fromkeys(member.split(".")[0] for member in scan_tar(shard))
        rows = [(key, {"codes.npy": npy(codes_of(int(key), tokenizer))}) for key in keys]
        write_tar(folder / shard.name, rows)
    mark = TokenizerMark.of(tokenizer)
    assert mark.num_tokens == last.stop
    (folder / TOKENIZER_FILE).write_text(mark.model_dump_json())
    return folder


def codes_of(number: int, tokenizer: Path) -> np.ndarray:
    """The codes of the sample of a number."""
    rng = np.random.default_rng(number)
    streams = read_folder(tokenizer).network.streams
    parts = [one.first_code + rng.integers(0, one.num_codes, one.num_tokens) for one in streams]
    return np.concatenate(parts).astype(np.int32)

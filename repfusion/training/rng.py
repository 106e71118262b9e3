"""The states of a process's random generators, kept in a checkpoint.

Nothing in the training loop draws from them: noise, captions and order are functions of seed and sample. They
are kept so that a module that does (dropout, say) resumes exactly too.
"""

import json
import random
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file


def rng_path(folder: Path, rank: int, world_size: int) -> Path:
    return folder / f"rng_{rank:05d}_of_{world_size:05d}.safetensors"


def save_rng(path: Path) -> None:
    """Python's, NumPy's, torch's, and the current GPU's."""
    states = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    kind, words, position, has_gauss, gauss = np.random.get_state()
    numpy_state = [kind, np.asarray(words).tolist(), position, has_gauss, gauss]
    save_file(states, str(path), {"python": json.dumps(random.getstate()), "numpy": json.dumps(numpy_state)})


def load_rng(path: Path) -> None:
    with safe_open(str(path), "pt") as file:
        metadata = file.metadata()
        torch.set_rng_state(file.get_tensor("torch"))
        if torch.cuda.is_available() and "cuda" in file.keys():
            torch.cuda.set_rng_state(file.get_tensor("cuda"))
    version, words, gauss = json.loads(metadata["python"])
    random.setstate((version, tuple(words), gauss))
    kind, words, position, has_gauss, gauss = json.loads(metadata["numpy"])
    np.random.set_state((kind, np.array(words, np.uint32), position, has_gauss, gauss))


def seed_rng(seed: int, step: int, rank: int) -> None:
    """Seeds the generators of a rank that has no saved state: the run went on with another number of them."""
    words = np.random.SeedSequence([seed, step, rank]).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    torch.manual_seed(int(words[2]))

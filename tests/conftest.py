"""What every test shares: one thread, no telemetry, no look at the network."""

import os

import pytest

for name, value in {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "NO_ALBUMENTATIONS_UPDATE": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "RAY_USAGE_STATS_ENABLED": "0",
    "WANDB_MODE": "disabled",
}.items():
    os.environ.setdefault(name, value)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Also after a test whose engine took more: by the number of threads sums differ in the last bits."""
    import torch

    torch.set_num_threads(1)

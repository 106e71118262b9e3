"""The name of a GPU -> its dense bfloat16 peak."""

import re

import torch

PEAKS = (
    (r"\bGB200\b", 2500e12),
    (r"\bB200\b", 2250e12),
    (r"\bH[12]00\b.*\bNVL\b", 835e12),
    (r"\bH[18]00\b.*\bPCIe\b", 756e12),
    (r"\b(H100|H200|H800|GH200)\b", 989e12),
    (r"\bH20\b", 148e12),
    (r"\bA[18]00\b", 312e12),
    (r"\bL40S\b", 362e12),
    (r"\bL40\b", 181e12),
    (r"\bL4\b", 121e12),
    (r"\bA40\b", 149.7e12),
    (r"\bA30\b", 165e12),
    (r"\bA10\b", 125e12),
    (r"\bRTX 4090\b", 165.2e12),
    (r"\bRTX 3090\b", 71e12),
    (r"\bMI300X\b", 1307e12),
)
"""Dense bfloat16 peak in FLOP/s by a pattern of the GPU's name, from the makers' data sheets; the first match
counts.
"""


def peak_of(name: str) -> float | None:
    """bfloat16 peak in FLOPs a second, by the name the driver gives a GPU; None where it is not in the
    table.
    """
    return next((peak for pattern, peak in PEAKS if re.search(pattern, name, re.IGNORECASE)), None)


def peak_flops(device: torch.device | str) -> float | None:
    """Dense bfloat16 peak of a device in FLOP/s. None for a CPU or an unknown GPU."""
    device = torch.device(device)
    return peak_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None

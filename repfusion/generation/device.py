"""The name of a device -> the device, where tensors can lie on it."""

import torch


def usable_device(name: str | torch.device) -> torch.device:
    """The device of a name, such as `cpu`, `cuda` or `cuda:1`.

    Raises:
        ValueError: there is none of that name here.
    """
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("it holds no values")
        torch.empty(1, device=device)
    # a build without CUDA asserts that it has it
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        there = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
        said = str(error).strip().partition("\n")[0]
        raise ValueError(f"device {str(name)!r}: {said}; there are {', '.join(['cpu', *there])}") from error
    return device

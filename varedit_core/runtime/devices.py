"""Where networks run."""

from __future__ import annotations

import torch


def device_of(name: str | torch.device | None = None) -> torch.device:
    """The device of that name, CUDA where there is one by default. ValueError where it cannot be used here."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError):
        raise ValueError(
            f"the device {name} cannot be used here; use cpu, or install a PyTorch that supports it"
        ) from None
    return device

"""How much memory a run takes."""

import torch


GIB = 1024**3


def reset_peak(device: torch.device) -> None:
    """Start the measurement of the peak anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_reserved_gib(device: torch.device) -> float:
    """Return the peak of what PyTorch reserved on the card, in GiB; 0 without one."""
    return torch.cuda.max_memory_reserved(device) / GIB if device.type == "cuda" else 0.0

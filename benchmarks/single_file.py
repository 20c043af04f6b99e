"""An SDXL of component folders as one file, and a first LoRA, for programs that read the original layouts."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from rasengan import components, single_file
from rasengan.lora import UNET_TARGETS
from rasengan.naming import kohya_name


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    weights = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights |= load_file(file)
    return weights


def write_single_file(base: Path, file: Path) -> None:
    """Write the base's folder as one safetensors file, in its own dtypes."""
    skeletons = {name: components.skeleton(name, base / name) for name in single_file.COMPONENTS}
    dtypes = {name: next(iter(_weights(base / name).values())).dtype for name in single_file.COMPONENTS}
    single_file.write_single_file(file, skeletons, dtypes, lambda name: _weights(base / name))


def write_first_lora(base: Path, file: Path, rank: int, alpha: float) -> None:
    """Write an untrained LoRA in kohya's layout for the projections that this project trains, and no others.

    A program that takes its modules from a file of weights then trains the very same 560 of them.
    """
    torch.manual_seed(0)
    weights = {}
    for name, tensor in _weights(base / "unet").items():
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and module.endswith(tuple(f".{target}" for target in UNET_TARGETS)):
            lora = kohya_name("unet", module)
            weights[f"{lora}.lora_down.weight"] = torch.randn(rank, tensor.shape[1]) / rank
            weights[f"{lora}.lora_up.weight"] = torch.zeros(tensor.shape[0], rank)
            weights[f"{lora}.alpha"] = torch.tensor(float(alpha))
    save_file(weights, file)

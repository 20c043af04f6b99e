"""Which model family a file is of, told from its names and the width of the text that its UNet takes."""

import re
from collections.abc import Mapping

import torch


SDXL = "Stable Diffusion XL"
# Width of the text that other families' UNets take.
OTHER_FAMILIES = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 1280: "the SDXL refiner"}
_MARKS = {  # kohya's names have underscores where others have dots
    "Flux": re.compile(r"(double|single|single_transformer)[._]blocks"),
    "Wan": re.compile(r"blocks[._]\d+[._](self_attn|cross_attn|ffn)|^transformer\.blocks\."),
    "Stable Diffusion 3": re.compile(r"joint[._]blocks|context_embedder|^transformer\.transformer_blocks"),
}
_TEXT_KEY = re.compile(r"attn2[._](?:processor\.)?to_[kv]")


def guess_family(tensors: Mapping[str, torch.Tensor]) -> str | None:
    """Return the model family that an adapter seems to be trained for; None where nothing tells.

    Args:
        tensors: by the names in its file.
    """
    for family, mark in _MARKS.items():
        if any(mark.search(name) for name in tensors):
            return family
    # The projection of the text down to the rank has the text's width as its second size.
    widths = {
        tensor.shape[1]
        for name, tensor in tensors.items()
        if _TEXT_KEY.search(name) and re.search(r"lora[._](A|down)", name) and tensor.ndim > 1
    }
    for width, family in (OTHER_FAMILIES | {2048: SDXL}).items():
        if width in widths:
            return family
    if any(name.startswith("lora_te_") for name in tensors):  # one text encoder, without a number
        return "Stable Diffusion 1.x or 2.x"
    return None

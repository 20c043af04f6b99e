"""What a file is of, if it is no SDXL adapter: told from its names and the width of the text that its UNet takes."""

import re
from collections.abc import Iterable, Mapping

import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection


SDXL = "Stable Diffusion XL"
# Width of the text that other families' UNets take.
OTHER_FAMILIES = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 1280: "the SDXL refiner"}
_MARKS = {  # kohya's names have underscores where others have dots
    "Flux or HunyuanVideo": re.compile(r"(double|single|single_transformer)[._]blocks"),
    "Wan": re.compile(r"blocks[._]\d+[._](self_attn|cross_attn|ffn)|^transformer\.blocks\."),
    "Stable Diffusion 3": re.compile(r"joint[._]blocks"),
    "a diffusion transformer, such as Stable Diffusion 3 or Qwen-Image": re.compile(
        r"context_embedder|^(transformer\.|diffusion_model\.|lora_unet_)transformer_blocks"
    ),
}
_WHOLE_MODELS = ("model.diffusion_model.", "first_stage_model.", "conditioner.", "down_blocks.", "time_embedding.")
_WHOLE_MODELS += ("input_blocks.", "decoder.", "encoder.", "text_model.", "embeddings.")
# Marks in the names of methods that PEFT does not merge, or not in this form.
_OTHER_METHODS = {
    ".oft_": "OFT",
    ".lora_mid": "a LoRA with a Tucker core",
    ".diff": "full weight changes (LyCORIS full)",
    "bundle_emb.": "an embedding that was trained beside it",
    ".w_norm": "norms (LyCORIS)",
    ".scalar": "a LyCORIS adapter with a trained factor",
    ".boft_": "BOFT",
    ".on_input": "(IA)3",
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
        if _TEXT_KEY.search(name) and re.search(r"lora[._](A|down)|hada_w1_b", name) and tensor.ndim > 1
    }
    for width, family in (OTHER_FAMILIES | {2048: SDXL}).items():
        if width in widths:
            return family
    if any(name.startswith("lora_te_") for name in tensors):  # one text encoder, without a number
        return "Stable Diffusion 1.x or 2.x"
    return None


def is_adapter(names: Iterable[str]) -> bool:
    """Say whether some of the names in a file are those of an adapter's weights."""
    return any(mark in name for name in names for mark in ("lora", "hada", "lokr"))


def is_whole_model(names: Iterable[str]) -> bool:
    """Say whether the names in a file are those of a model, or a part of one, and no adapter's."""
    names = list(names)
    return not is_adapter(names) and any(name.startswith(_WHOLE_MODELS) for name in names)


def other_method(names: Iterable[str]) -> str | None:
    """Return the method, not read here, that an adapter was trained by; None where no name tells."""
    names = list(names)
    return next((method for mark, method in _OTHER_METHODS.items() if any(mark in name for name in names)), None)


def not_in_sdxl(component: str, modules: Iterable[str]) -> list[str]:
    """Return which of an adapter's modules no SDXL has, whatever its widths.

    Args:
        component: "unet", "text_encoder" or "text_encoder_2".
        modules: named as in `adapters`.
    """
    with torch.device("meta"):
        if component == "unet":
            # SDXL's levels and greatest depth at every level: that covers its smaller relatives too, whose attention
            # is on others.
            model = UNet2DConditionModel(
                down_block_types=("CrossAttnDownBlock2D",) * 3,
                up_block_types=("CrossAttnUpBlock2D",) * 3,
                block_out_channels=(32, 64, 128),
                transformer_layers_per_block=10,
                addition_embed_type="text_time",
                addition_time_embed_dim=32,
                projection_class_embeddings_input_dim=32,
            )
        elif component == "text_encoder":
            model = CLIPTextModel(CLIPTextConfig(num_hidden_layers=12))
        else:
            model = CLIPTextModelWithProjection(CLIPTextConfig(num_hidden_layers=32))
    known = {name.removeprefix("text_model.") for name, _ in model.named_modules()}
    return sorted(module for module in modules if module.removeprefix("text_model.") not in known)

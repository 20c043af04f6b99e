"""An SDXL of component folders as one file in the original checkpoint's layout, for programs that read that."""

import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from rasengan.lora import UNET_TARGETS


# Rules from the component's names to the original's, in order; a rule's number is a regular expression's group.
_UNET_PLACES = (
    (r"^conv_in\.", "input_blocks.0.0."),
    (r"^time_embedding\.linear_1\.", "time_embed.0."),
    (r"^time_embedding\.linear_2\.", "time_embed.2."),
    (r"^add_embedding\.linear_1\.", "label_emb.0.0."),
    (r"^add_embedding\.linear_2\.", "label_emb.0.2."),
    (r"^mid_block\.resnets\.0\.", "middle_block.0."),
    (r"^mid_block\.attentions\.0\.", "middle_block.1."),
    (r"^mid_block\.resnets\.1\.", "middle_block.2."),
    (r"^conv_norm_out\.", "out.0."),
    (r"^conv_out\.", "out.2."),
)
_RESNET_PARTS = (
    (r"\.norm1\.", ".in_layers.0."),
    (r"\.conv1\.", ".in_layers.2."),
    (r"\.time_emb_proj\.", ".emb_layers.1."),
    (r"\.norm2\.", ".out_layers.0."),
    (r"\.conv2\.", ".out_layers.3."),
    (r"\.conv_shortcut\.", ".skip_connection."),
)
_VAE_PLACES = (
    (r"down_blocks\.(\d)\.resnets\.(\d)\.", r"down.\1.block.\2."),
    (r"down_blocks\.(\d)\.downsamplers\.0\.", r"down.\1.downsample."),
    (r"up_blocks\.(\d)\.resnets\.(\d)\.", lambda m: f"up.{3 - int(m[1])}.block.{m[2]}."),
    (r"up_blocks\.(\d)\.upsamplers\.0\.", lambda m: f"up.{3 - int(m[1])}.upsample."),
    (r"mid_block\.resnets\.(\d)\.", lambda m: f"mid.block_{int(m[1]) + 1}."),
    (r"mid_block\.attentions\.0\.", "mid.attn_1."),
    (r"conv_norm_out\.", "norm_out."),
    (r"conv_shortcut\.", "nin_shortcut."),
    (r"group_norm\.", "norm."),
    (r"to_([qkv])\.", r"\1."),
    (r"to_out\.0\.", "proj_out."),
)
_BIGG_PLACES = (
    (r"^embeddings\.token_embedding\.weight", "token_embedding.weight"),
    (r"^embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"^final_layer_norm\.", "ln_final."),
    (r"^encoder\.layers\.", "transformer.resblocks."),
    (r"\.self_attn\.out_proj\.", ".attn.out_proj."),
    (r"\.layer_norm([12])\.", r".ln_\1."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
)


def _rename(name: str, rules) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def unet_name(name: str) -> str:
    """Return the original's name of a UNet's tensor or module; SDXL has three levels of two or three layers."""
    if ".resnets." in name:
        name = _rename(name, _RESNET_PARTS)
    name = _rename(name, _UNET_PLACES)
    match = re.match(r"(down|up)_blocks\.(\d)\.(resnets|attentions|downsamplers|upsamplers)\.(\d)\.(.+)", name)
    if match is None:
        return name
    side, level, kind, layer, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    if kind == "downsamplers":
        return f"input_blocks.{3 * level + 3}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        return f"output_blocks.{3 * level + 2}.2.{rest}"
    block = f"input_blocks.{3 * level + layer + 1}" if side == "down" else f"output_blocks.{3 * level + layer}"
    return f"{block}.{int(kind == 'attentions')}.{rest}"


def _vae_tensor(name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
    # The original's attention is made of 1x1 convolutions.
    is_projection = ".attentions." in name and tensor.ndim == 2
    return _rename(name, _VAE_PLACES), tensor[:, :, None, None] if is_projection else tensor


def _bigg(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return OpenCLIP's layout: q, k and v stacked, the projection transposed."""
    original, stacked = {}, {}
    for name, tensor in weights.items():
        name = name.removeprefix("text_model.")
        if match := re.match(r"encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(weight|bias)", name):
            stacked.setdefault((match[1], match[3]), {})[match[2]] = tensor
        elif name == "text_projection.weight":
            original["text_projection"] = tensor.T
        else:
            original[_rename(name, _BIGG_PLACES)] = tensor
    for (layer, kind), parts in stacked.items():
        original[f"transformer.resblocks.{layer}.attn.in_proj_{kind}"] = torch.cat([parts[part] for part in "qkv"])
    return original


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    weights = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights |= load_file(file)
    return weights


def original_layout(base: Path) -> dict[str, torch.Tensor]:
    """Return all the weights of a base's folder by the names, and in the shapes, of the original checkpoint."""
    unet = {f"model.diffusion_model.{unet_name(k)}": tensor for k, tensor in _weights(base / "unet").items()}
    vae = dict(_vae_tensor(name, tensor) for name, tensor in _weights(base / "vae").items())
    clip = {k.removeprefix("text_model."): tensor for k, tensor in _weights(base / "text_encoder").items()}
    bigg = _bigg(_weights(base / "text_encoder_2"))
    return (
        unet
        | {f"first_stage_model.{name}": tensor for name, tensor in vae.items()}
        | {f"conditioner.embedders.0.transformer.text_model.{name}": tensor for name, tensor in clip.items()}
        | {f"conditioner.embedders.1.model.{name}": tensor for name, tensor in bigg.items()}
    )


def write_single_file(base: Path, file: Path) -> None:
    """Write the base's folder as one safetensors file, in its own dtypes."""
    save_file({name: tensor.contiguous() for name, tensor in original_layout(base).items()}, file)


def write_first_lora(base: Path, file: Path, rank: int, alpha: float) -> None:
    """Write an untrained LoRA in kohya's layout for the projections that this project trains, and no others.

    A program that takes its modules from a file of weights then trains the very same 560 of them.
    """
    torch.manual_seed(0)
    weights = {}
    for name, tensor in _weights(base / "unet").items():
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and module.endswith(tuple(f".{target}" for target in UNET_TARGETS)):
            lora = "lora_unet_" + unet_name(module).replace(".", "_")
            weights[f"{lora}.lora_down.weight"] = torch.randn(rank, tensor.shape[1]) / rank
            weights[f"{lora}.lora_up.weight"] = torch.zeros(tensor.shape[0], rank)
            weights[f"{lora}.alpha"] = torch.tensor(float(alpha))
    save_file(weights, file)

"""Decode latents to pictures in fp32, whole or in overlapping tiles, within little memory."""

import math
import types

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from rasengan import kernels


# A tile's side in latents, and how far neighbours overlap: 576 px and 128 px. Two cover a picture of 1024 px.
TILE, OVERLAP = 72, 16


def fuse_decoder(vae: AutoencoderKL) -> None:
    """Let a decoder's residual blocks and norms run by `kernels`, each pass reading and writing its tensors once.

    For cards with TF32, whose convolutions are fastest in channels_last. The arithmetic is that of diffusers' modules.
    """
    vae.decoder.to(memory_format=torch.channels_last)
    for module in vae.decoder.modules():
        if isinstance(module, ResnetBlock2D):
            module.forward = types.MethodType(_resnet, module)
    vae.decoder.conv_norm_out.forward = types.MethodType(_norm_and_silu, vae.decoder.conv_norm_out)
    vae.decoder.conv_act = nn.Identity()


def _norm_and_silu(norm: nn.GroupNorm, x: torch.Tensor) -> torch.Tensor:
    return kernels.group_norm(x, None, norm.weight, norm.bias, norm.num_groups, norm.eps, True)[0]


def _resnet(module: ResnetBlock2D, x: torch.Tensor, temb: None) -> torch.Tensor:
    # Each result takes the name of its input, whose memory is free then.
    y = _norm_and_silu(module.norm1, x)
    y = F.conv2d(y, module.conv1.weight, module.conv1.bias, padding=1)
    y = _norm_and_silu(module.norm2, y)
    y = F.conv2d(y, module.conv2.weight, None, padding=1)
    if module.conv_shortcut is not None:
        x = F.conv2d(x, module.conv_shortcut.weight, module.conv_shortcut.bias)
    return kernels.add_with_bias(x, y, module.conv2.bias)


@torch.no_grad()
def decode_latents(
    vae: AutoencoderKL, latents: torch.Tensor, tile: int | None = TILE, overlap: int = OVERLAP
) -> torch.Tensor:
    """Return pixels (B, 3, H, W), fp32 in [-1, 1], of latents (B, 4, H/8, W/8) in any dtype, outside autocast.

    One picture at a time. A tile has its own group norms, so that a tiled picture is nearly that of a whole decode,
    not exactly; neighbours are blended linearly where they overlap.

    Args:
        vae: fp32; SDXL's overflows in fp16.
        latents: as the UNet gave them, on the VAE's device.
        tile: the largest side that is decoded at once, in latents; None decodes whole pictures.
        overlap: of neighbouring tiles, in latents.
    """
    latents = latents.to(vae.dtype) / vae.config.scaling_factor
    with torch.autocast(latents.device.type, enabled=False):
        return torch.cat([_decode(vae, latent[None], tile, overlap) for latent in latents]).clamp_(-1, 1)


def _decode(vae: AutoencoderKL, latent: torch.Tensor, tile: int | None, overlap: int) -> torch.Tensor:
    rows, columns = (spans(side, tile, overlap) for side in latent.shape[2:])
    if len(rows) == len(columns) == 1:
        return vae.decode(latent, return_dict=False)[0]
    scale = 2 ** (len(vae.config.block_out_channels) - 1)
    pixels = latent.new_zeros(1, vae.config.out_channels, *(scale * side for side in latent.shape[2:]))
    for row, (top, bottom) in enumerate(rows):
        for column, (left, right) in enumerate(columns):
            decoded = vae.decode(latent[:, :, top:bottom, left:right].contiguous(), return_dict=False)[0]
            decoded *= _weights(rows, row, scale, latent.device)[:, None] * _weights(
                columns, column, scale, latent.device
            )
            pixels[:, :, scale * top : scale * bottom, scale * left : scale * right] += decoded
    return pixels


def spans(side: int, tile: int | None, overlap: int) -> list[tuple[int, int]]:
    """Return the start and end of each tile along a side: as few as do, of one length, overlapping at least so far."""
    if tile is None or side <= tile:
        return [(0, side)]
    count = math.ceil((side - overlap) / (tile - overlap))
    length = math.ceil((side + (count - 1) * overlap) / count)
    starts = [round(number * (side - length) / (count - 1)) for number in range(count)]
    return [(start, start + length) for start in starts]


def _weights(tiles: list[tuple[int, int]], number: int, scale: int, device: torch.device) -> torch.Tensor:
    """Return a tile's weight for each of its pixels along a side; those of overlapping tiles sum to 1."""
    start, end = tiles[number]
    weights = torch.ones(scale * (end - start), device=device)
    if number > 0:
        shared = scale * (tiles[number - 1][1] - start)
        weights[:shared] = (torch.arange(shared, device=device) + 0.5) / shared
    if number < len(tiles) - 1:
        shared = scale * (end - tiles[number + 1][0])
        weights[-shared:] = 1 - (torch.arange(shared, device=device) + 0.5) / shared
    return weights

"""The linear layers of a UNet, those of one input as one product, and their LoRAs out of the flat parameter."""

import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from peft.tuners.lora import LoraLayer
from torch import nn

from rasengan import lora, nodes


def linear_layers(module: nn.Module) -> list[nn.Module]:
    """Return the layers that this module's forward runs, and that may thus have a LoRA."""
    if isinstance(module, Transformer2DModel):
        return [module.proj_in, module.proj_out]
    if isinstance(module, BasicTransformerBlock):
        attentions = (module.attn1, module.attn2)
        projections = [layer for a in attentions for layer in (a.to_q, a.to_k, a.to_v, a.to_out[0])]
        return [*projections, module.ff.net[0].proj, module.ff.net[2]]
    return []


class Projection:
    """One or several linear layers of one input, with or without a LoRA, as one product."""

    def __init__(self, layers: list[nn.Module]):
        base = lora.base_of(layers[0])
        self.layers, self.bias, self.has_lora = layers, base.bias, isinstance(layers[0], LoraLayer)
        self.weight = lora.stacked_weight(layers) if len(layers) > 1 else base.weight
        self.lora = self.shape_A = self.shape_B = self.grad_A = self.grad_B = None
        if self.has_lora:
            rank = layers[0].r["default"]
            self.shape_A = torch.Size((len(layers) * rank, base.in_features))
            self.shape_B = torch.Size((len(layers), base.out_features, rank))

    def set_lora(self, part_A: torch.Tensor, part_B: torch.Tensor, scale: float) -> None:
        """Take the LoRA's elements for one forward pass and its backward; `scale` is in part_B."""
        matrices = part_A.view(self.shape_A), part_B.view(self.shape_B)
        self.lora = nodes.LoraMatrices(*matrices, self.grad_A, self.grad_B, scale)

    def __call__(self, rows: torch.Tensor, anchor: torch.Tensor | None) -> torch.Tensor:
        """Return (T, n E) for rows (T, D); `anchor` is as `nodes.LoraProduct` takes it, None without a LoRA."""
        if self.has_lora:
            return nodes.LoraProduct.apply(rows, anchor, self.lora, self.weight, self.bias)
        return F.linear(rows, self.weight, self.bias)


class Projections:
    """All linear layers that `lora.all_projections` groups; called with any linear layer, it runs the group of that.

    The LoRA's gradients arrive in `flat.grad`, and so in those of PEFT's parameters, which are views of it.
    """

    def __init__(self, unet: nn.Module, flat: nn.Parameter | None, scale: float):
        """Group the layers; the arguments are those of `fused.FusedUNet`."""
        self.flat, self.scale = flat, scale
        groups = [Projection(layers) for layers in lora.all_projections(unet)]
        self.by_layer = {id(layer): projection for projection in groups for layer in projection.layers}
        self.with_lora = [projection for projection in groups if projection.has_lora]
        self.ends = self._place_gradients()
        self.casts = {}  # for each dtype a tensor that holds the LoRA in it
        self.anchor = None  # of the forward that runs, as `nodes.LoraProduct` takes it

    def _place_gradients(self) -> tuple[int, int]:
        """Give each projection its part of the flat gradient; return where all lora_A end, and all lora_B."""
        middle = sum(projection.shape_A.numel() for projection in self.with_lora)
        start_A, start_B = 0, middle
        for projection in self.with_lora:
            end_A, end_B = start_A + projection.shape_A.numel(), start_B + projection.shape_B.numel()
            projection.grad_A = self.flat.grad[start_A:end_A].view(projection.shape_A)
            projection.grad_B = self.flat.grad[start_B:end_B].view(projection.shape_B)
            start_A, start_B = end_A, end_B
        return middle, start_B

    @torch.no_grad()
    def cast_lora(self, dtype: torch.dtype) -> None:
        """Cast the LoRA matrices of all projections out of the flat parameter, all lora_A and all lora_B at once.

        They lie in one place in every forward, and in every CUDA graph: in 16 bits each would hold a copy of its own
        otherwise. So the flat parameter must not change between a forward and its backward, which autograd would not
        see.
        """
        middle, end = self.ends
        if dtype not in self.casts:
            self.casts[dtype] = self.flat.new_empty(end, dtype=dtype)
        part_A, part_B = self.casts[dtype].split([middle, end - middle])
        part_A.copy_(self.flat[:middle])
        torch.mul(self.flat[middle:end], self.scale, out=part_B)
        parts_A = part_A.split([p.shape_A.numel() for p in self.with_lora])
        parts_B = part_B.split([p.shape_B.numel() for p in self.with_lora])
        for projection, part_A, part_B in zip(self.with_lora, parts_A, parts_B, strict=True):
            projection.set_lora(part_A, part_B, self.scale)
        # Of this forward alone: a leaf that lived on would hold the stream of its first backward pass.
        self.anchor = torch.empty((), device=self.flat.device, requires_grad=True)

    def beside(self, layer: nn.Module) -> list[nn.Module]:
        """Return the layers that one product computes with this one, itself among them."""
        return self.by_layer[id(layer)].layers if id(layer) in self.by_layer else [layer]

    def __call__(self, layer: nn.Module, rows: torch.Tensor) -> torch.Tensor:
        """Return (T, n E) for rows (T, D): what the n layers of `beside` compute, side by side."""
        projection = self.by_layer.get(id(layer))
        if projection is not None:
            return projection(rows, self.anchor)
        return (
            layer(rows) if type(layer) is nn.Linear else nodes.QuantizedProduct.apply(rows, layer.weight, layer.bias)
        )


@torch.no_grad()
def stack_time_projections(unet: nn.Module) -> list[tuple[list[int], torch.Tensor, torch.Tensor]]:
    """Move the weights of the timestep's projections of each width into one tensor, of which they become views.

    Returns:
        For each width E of residual blocks the blocks' ids, the weights (n, E, D), and (n, 1, E) the biases of
        projection and first convolution together, both of which nothing trains or merges into.
    """
    by_width = {}
    for module in unet.modules():
        if isinstance(module, ResnetBlock2D):
            by_width.setdefault(module.out_channels, []).append(module)
    stacks = []
    for blocks in by_width.values():
        weight = torch.stack([block.time_emb_proj.weight for block in blocks])
        bias = torch.stack([block.time_emb_proj.bias + block.conv1.bias for block in blocks])[:, None]
        for block, part in zip(blocks, weight, strict=True):
            block.time_emb_proj.weight.data = part
        stacks.append(([id(block) for block in blocks], weight, bias))
    return stacks

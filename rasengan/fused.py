"""SDXL's UNet, run fast for training or drawing: modules stay diffusers' and PEFT's, only how they run differs.

The same arithmetic as theirs, but for the order of rounding, in a third of the kernels and two thirds of the memory:

- all LoRA matrices are cast to the UNet's dtype together, and their gradients are added where they belong, on a
  stream of their own;
- projections of one input are one product: a self-attention's q, k and v; the k and v of all attentions to the text;
  the timestep's in all residual blocks of a width;
- the attention to the text, whose keys are few, has kernels of its own (`text_attention.py`);
- norms are fused with what stands around them, and pictures stay in channels_last throughout;
- what the up blocks concatenate is read where it is;
- nothing is kept for the backward pass that a frozen layer does not need (`nodes.py`), and no gradient computed for
  what stands before the first LoRA;
- any number of blocks can be recomputed in the backward pass rather than kept.

A UNet that has a LoRA runs so in training mode; in evaluation mode (`unet.eval()`) its modules run as diffusers and
PEFT wrote them. One without, merged or never adapted, always runs fused.
"""

import types
from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_blocks import CrossAttnUpBlock2D, UpBlock2D
from diffusers.models.upsampling import Upsample2D
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.utils.checkpoint import checkpoint

from rasengan import lora, nodes, text_attention
from rasengan.projections import Projections, linear_layers, stack_time_projections


def why_not(unet: nn.Module) -> str | None:
    """Say what keeps a UNet, with a LoRA or without, from being run by this module; None where nothing does."""
    if type(unet.conv_act) is not nn.SiLU or unet.encoder_hid_proj is not None:
        return "it has another activation than SiLU, or projects the text first"
    inside = {id(layer) for block in unet.modules() for layer in linear_layers(block)}
    for name, module in unet.named_modules():
        if isinstance(module, LoraLayer):
            if id(module) not in inside:
                return f"{name} has a LoRA outside the transformer blocks"
            plain = list(module.lora_A) == ["default"] and not module.lora_variant
            if not plain or not isinstance(module.lora_dropout["default"], nn.Identity):
                return f"{name} has dropout, or a variant of LoRA"
        elif isinstance(module, ResnetBlock2D):
            plain = (module.time_embedding_norm, module.output_scale_factor, module.upsample, module.downsample)
            is_silu = type(module.nonlinearity) is nn.SiLU
            if plain != ("default", 1.0, None, None) or module.skip_time_act or module.dropout.p or not is_silu:
                return f"{name} is no plain residual block"
        elif isinstance(module, BasicTransformerBlock):
            plain = (module.norm_type, module.pos_embed, module.activation_fn, module.only_cross_attention)
            if plain != ("layer_norm", None, "geglu", False) or module.attn2 is None or module.dropout:
                return f"{name} is no plain transformer block"
            if any(type(attn.processor) is not AttnProcessor2_0 for attn in (module.attn1, module.attn2)):
                return f"{name} does not use PyTorch's attention"
        elif isinstance(module, Transformer2DModel) and not module.use_linear_projection:
            return f"{name} does not project linearly"
    return None


def upsample_deterministically(unet: nn.Module) -> None:
    """Give the upsamplers of a UNet that runs as diffusers wrote it a backward pass that is the same each time."""
    for module in unet.modules():
        if type(module) is Upsample2D:
            module.forward = types.MethodType(_upsample, module)


class FusedUNet:
    """Gives a UNet its forward, and holds what the steps share; its `Projections` have the LoRA and its gradient."""

    def __init__(self, unet: nn.Module, flat: nn.Parameter | None = None, scale: float = 1.0):
        """Take over the forward of a UNet for which `why_not` has nothing to say.

        Args:
            unet: on its device, its weights stacked by `lora.stack_weights`.
            flat: begins with the UNet's part of `lora.flat_order`; has a gradient. None for a UNet without a LoRA.
            scale: alpha / rank.
        """
        self.unet, self.flat = unet, flat
        self.projections = Projections(unet, flat, scale)
        self.text = {}  # keys and values of each block's attention to the text, while the forward runs
        self.shifts = {}  # what each residual block adds for the timestep, likewise
        self.held, self.conditions = {}, {}
        self.recomputed = set()
        self.time_projections = stack_time_projections(unet)
        unet.to(memory_format=torch.channels_last)
        forwards = {ResnetBlock2D: self._resnet, Transformer2DModel: self._transformer}
        forwards |= {CrossAttnUpBlock2D: _up_block, UpBlock2D: _up_block, nn.Conv2d: _conv, Upsample2D: _upsample}
        for module in unet.modules():
            if type(module) in forwards:
                self._replace(module, forwards[type(module)])
        self._replace(unet.conv_norm_out, lambda norm, x: _group_norm(x, norm, silu=True)[2])
        self._replace(unet.conv_act, lambda activation, x: x)  # conv_norm_out has done it
        self._replace(unet, self._forward)
        if flat is None:
            unet.get_aug_embed = types.MethodType(self._embed_condition, unet)

    def _replace(self, module: nn.Module, forward: Callable) -> None:
        original = type(module).forward

        def dispatch(module, *inputs, **options):
            is_fused = self.flat is None or self.unet.training
            return (forward if is_fused else original)(module, *inputs, **options)

        module.forward = types.MethodType(dispatch, module)

    # --- what is recomputed ---

    def units(self) -> list[nn.Module]:
        """Return the blocks that can be recomputed, those first that free the most memory for their work.

        These are the ones of few channels and many pixels. What stands before the first LoRA keeps nothing anyway.
        """
        blocks = [*self.unet.down_blocks, self.unet.mid_block, *self.unet.up_blocks]
        first = next(n for n, block in enumerate(blocks) if any(isinstance(m, LoraLayer) for m in block.modules()))
        found = [module for block in blocks[first:] for module in block.modules()]
        found = [module for module in found if isinstance(module, ResnetBlock2D | BasicTransformerBlock)]
        return sorted(found, key=lambda m: m.out_channels if isinstance(m, ResnetBlock2D) else m.dim)

    def recompute(self, count: int) -> None:
        """Recompute the first `count` of `units` in the backward pass, and keep what the others computed."""
        self.recomputed = {id(unit) for unit in self.units()[:count]}

    def _checkpointed(self, function: Callable, unit: nn.Module, *inputs):
        if id(unit) in self.recomputed and torch.is_grad_enabled():
            return checkpoint(function, unit, *inputs, use_reentrant=False, preserve_rng_state=False)
        return function(unit, *inputs)

    # --- what all steps of a picture share ---

    @torch.no_grad()
    def hold_condition(self, encoder_hidden_states: torch.Tensor, text_embeds: torch.Tensor, time_ids: torch.Tensor):
        """Compute what a UNet without a LoRA makes of the text and the sizes, for forwards that get None for the text.

        Of texts of one shape it stays in one place, so that a CUDA graph which reads it sees the latest.

        Args:
            encoder_hidden_states: (B, T, D).
            text_embeds: (B, P).
            time_ids: (B, 6).
        """
        pictures, tokens, _ = encoder_hidden_states.shape
        self.held = self.conditions.setdefault((pictures, tokens), {})

        def hold(key, tensor):
            self.held[key] = self.held[key].copy_(tensor) if key in self.held else tensor

        # One layer after another: all at once would be there twice.
        for block in lora.transformer_blocks(self.unet):
            for layer in (block.attn2.to_k, block.attn2.to_v):
                rows = layer(encoder_hidden_states)
                hold(id(layer), rows.view(pictures, tokens, block.attn2.heads, -1))
        added = {"text_embeds": text_embeds, "time_ids": time_ids}
        hold("embedding", type(self.unet).get_aug_embed(self.unet, text_embeds, encoder_hidden_states, added))

    def forget_conditions(self) -> None:
        """Give the memory of all that `hold_condition` computed back; graphs that read it must be gone."""
        self.held = {}
        self.conditions.clear()

    def _embed_condition(self, unet, emb, encoder_hidden_states, added_cond_kwargs):
        if encoder_hidden_states is None:
            return self.held["embedding"]
        return type(unet).get_aug_embed(unet, emb, encoder_hidden_states, added_cond_kwargs)

    # --- the forward, from the whole to the parts ---

    def _forward(self, unet, sample, timestep, encoder_hidden_states, **kwargs):
        if self.flat is not None:
            self.projections.cast_lora(sample.dtype)
        try:
            self._project_text(encoder_hidden_states)
            return type(unet).forward(unet, sample, timestep, encoder_hidden_states, **kwargs)
        finally:
            self.text.clear()
            self.shifts.clear()

    def _project_text(self, encoder_hidden_states: torch.Tensor | None) -> None:
        """Compute the keys and values of all attentions to the text, stacked ones by one product; None: those held."""
        if encoder_hidden_states is None:
            for block in lora.transformer_blocks(self.unet):
                self.text[id(block)] = self.held[id(block.attn2.to_k)], self.held[id(block.attn2.to_v)]
            return
        pictures, tokens, width = encoder_hidden_states.shape
        rows = encoder_hidden_states.reshape(-1, width)
        projected = {}
        for block in lora.transformer_blocks(self.unet):
            attn = block.attn2
            for layer in (attn.to_k, attn.to_v):
                if id(layer) not in projected:
                    layers = self.projections.beside(layer)
                    parts = self.projections(layer, rows).view(pictures, tokens, len(layers), attn.heads, -1).unbind(2)
                    projected |= {id(of): part for of, part in zip(layers, parts, strict=True)}
            self.text[id(block)] = projected[id(attn.to_k)], projected[id(attn.to_v)]

    def _transformer(self, module, hidden_states, encoder_hidden_states=None, return_dict=True, **_):
        pictures = len(hidden_states)
        residual, _, y = _group_norm(hidden_states, module.norm, silu=False)
        x = self.projections(module.proj_in, nodes.as_rows(y))
        delta = None  # what the last block adds, which the next one's norm does
        for block in module.transformer_blocks:
            keys_values = self.text[id(block)]
            if id(block) in self.recomputed:  # then the sum alone is kept
                x, delta = self._checkpointed(self._block_and_sum, block, x, delta, *keys_values, pictures), None
            else:
                x, delta = self._block(block, x, delta, *keys_values, pictures)
        y = self.projections(module.proj_out, x if delta is None else x + delta)
        output = nodes.as_pictures(y + nodes.as_rows(residual), residual)
        return (output,) if not return_dict else types.SimpleNamespace(sample=output)

    def _block(self, block, x, delta, text_keys, text_values, pictures):
        """Return x (T, D), and what the feed-forward part adds to it."""
        x, y = _add_layer_norm(x, delta, block.norm1)
        q, k, v = self._self_attention_inputs(block.attn1, y, pictures)
        delta = self.projections(block.attn1.to_out[0], _attend(q, k, v))
        x, y = _add_layer_norm(x, delta, block.norm2)
        q = self.projections(block.attn2.to_q, y).view(pictures, -1, *text_keys.shape[2:])
        y = text_attention.attend(q, text_keys, text_values)
        delta = self.projections(block.attn2.to_out[0], y.flatten(2).flatten(0, 1))
        x, y = _add_layer_norm(x, delta, block.norm3)
        y = nodes.Geglu.apply(self.projections(block.ff.net[0].proj, y))
        return x, self.projections(block.ff.net[2], y)

    def _block_and_sum(self, *inputs):
        x, delta = self._block(*inputs)
        return x + delta

    def _self_attention_inputs(self, attn, y, pictures):
        """Return q, k and v, each (pictures, heads, tokens, head width)."""
        layers = [attn.to_q, attn.to_k, attn.to_v]
        width = y.shape[-1] // attn.heads
        if self.projections.beside(attn.to_q) == layers:
            parts = self.projections(attn.to_q, y).view(pictures, -1, 3, attn.heads, width).unbind(2)
        else:
            parts = [self.projections(layer, y).view(pictures, -1, attn.heads, width) for layer in layers]
        return [part.transpose(1, 2) for part in parts]

    def _resnet(self, module, input_tensor, temb, skip=None):
        if not self.shifts:
            rows = F.silu(temb)
            for blocks, weight, bias in self.time_projections:
                shifts = torch.baddbmm(bias, rows.expand(len(blocks), -1, -1), weight.transpose(1, 2))
                self.shifts |= zip(blocks, shifts, strict=True)
        return self._checkpointed(_resnet, module, input_tensor, skip, self.shifts[id(module)])


def _attend(q, k, v):
    """Return the attention's output as rows (T, D)."""
    y = F.scaled_dot_product_attention(q, k, v)  # (pictures, heads, tokens, head width)
    return y.transpose(1, 2).reshape(-1, y.shape[1] * y.shape[3])


def _add_layer_norm(x, delta, norm: nn.LayerNorm):
    return nodes.AddLayerNorm.apply(x, delta, norm.weight, norm.bias, norm.eps)


def _group_norm(x, norm: nn.GroupNorm, silu: bool, skip=None, shift=None):
    return nodes.GroupNormSilu.apply(x, skip, shift, norm.weight, norm.bias, norm.num_groups, norm.eps, silu)


def _conv(layer: nn.Conv2d, x, with_bias: bool = True):
    return nodes.FrozenConv.apply(x, layer.weight, layer.bias if with_bias else None, layer.stride, layer.padding)


def _upsample(module, x, output_size=None, *_, **__):
    y = nodes.Upsample.apply(x)
    if output_size is not None:  # an odd number of pixels: the same, but for the last row or column
        y = y[:, :, : output_size[0], : output_size[1]]
    return module.conv(y) if module.use_conv else y


def _up_block(
    block, hidden_states, res_hidden_states_tuple, temb=None, encoder_hidden_states=None, upsample_size=None, **_
):
    x, skips = hidden_states, reversed(res_hidden_states_tuple)
    for number, (resnet, skip) in enumerate(zip(block.resnets, skips, strict=True)):
        x = resnet(x, temb, skip)
        if isinstance(block, CrossAttnUpBlock2D):
            x = block.attentions[number](x, encoder_hidden_states, return_dict=False)[0]
    for upsampler in block.upsamplers or []:
        x = upsampler(x, upsample_size)
    return x


def _resnet(module, x, skip, shift):
    # The biases of the convolutions are added where a pass is made anyway: the first one's is in the shift.
    if skip is None or skip.requires_grad:
        x, skip, y = _group_norm(x, module.norm1, silu=True, skip=skip)
        y = _conv(module.conv1, y, with_bias=False)
    else:
        norm, conv = module.norm1, module.conv1
        options = norm.weight, norm.bias, norm.num_groups, norm.eps, conv.weight, conv.padding
        x, y = nodes.GroupNormSiluConv.apply(x, skip, *options)
    _, _, y = _group_norm(y, module.norm2, silu=True, shift=shift)
    y = _conv(module.conv2, y, with_bias=False)
    bias, shortcut = module.conv2.bias, module.conv_shortcut
    if shortcut is not None:
        bias = bias + shortcut.bias
        x = _conv(shortcut, x, with_bias=False) if skip is None else nodes.PixelProduct.apply(x, skip, shortcut.weight)
    elif skip is not None:
        x = torch.cat([x, skip], dim=1)
    return nodes.AddWithBias.apply(x, y, bias)

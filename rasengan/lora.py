"""Give a frozen model a LoRA through PEFT, and hold all its matrices in one flat parameter."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch
from diffusers.models.attention import BasicTransformerBlock
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn

from rasengan import UserError


UNET_TARGETS = ("to_k", "to_q", "to_v", "to_out.0")
TEXT_ENCODER_TARGETS = ("k_proj", "q_proj", "v_proj", "out_proj")


def lora_config(
    rank: int, lora_alpha: float, target_modules: list[str], dropout: float = 0.0, init: str = "gaussian"
) -> LoraConfig:
    """Return PEFT's configuration of a LoRA; `init` is "gaussian", or "default" for PEFT's own (Kaiming)."""
    return LoraConfig(
        r=rank,
        lora_alpha=lora_alpha,
        lora_dropout=dropout,
        init_lora_weights="gaussian" if init == "gaussian" else True,
        target_modules=list(target_modules),
    )


def check_targets(model: torch.nn.Module, target_modules: list[str]) -> None:
    """Check that each target names linear layers of the model, which may be a skeleton on the meta device.

    Raises:
        UserError: one matches nothing, or something that is no linear layer.
    """
    for target in target_modules:
        if not target:
            raise UserError("--lora_target_modules has an empty name, as an unset variable is. Give modules' names.")
        matches = [(name, m) for name, m in model.named_modules() if name == target or name.endswith(f".{target}")]
        if not matches:
            raise UserError(
                f"--lora_target_modules {target} matches no module of the {type(model).__name__}. Give the end of a "
                f"module's name; the recipe's are {' '.join(UNET_TARGETS)}."
            )
        for name, module in matches:
            if not isinstance(module, torch.nn.Linear):
                raise UserError(
                    f"--lora_target_modules {target} matches {name}, a {type(module).__name__}. Give linear layers "
                    f"only; the recipe's are {' '.join(UNET_TARGETS)}."
                )


def add_lora(model: torch.nn.Module, config: LoraConfig) -> None:
    """Put a LoRA into the model, with fp32 weights whatever the dtype of the frozen ones.

    Draws lora_A from the global CPU generator.
    """
    model.add_adapter(config)
    for parameter in trainable_parameters(model).values():
        parameter.data = parameter.data.float()


def trainable_parameters(*models: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return the parameters that require a gradient, by name, in the models' own order."""
    return {
        f"{position}.{name}": parameter
        for position, model in enumerate(models)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def flatten_parameters(parameters: list[torch.nn.Parameter]) -> torch.nn.Parameter:
    """Move the parameters into one contiguous tensor, of which they become views, and their gradients likewise.

    Everything that is done to all of them (zero, reduce, clip, update) is then one operation on one tensor.
    The gradient must be zeroed in place: set to None it would leave the views behind, and training would stand still.

    Args:
        parameters: all of one dtype, on one device.
    """
    flat = torch.nn.Parameter(torch.cat([parameter.detach().reshape(-1) for parameter in parameters]))
    flat.grad = torch.zeros_like(flat)
    offset = 0
    for parameter in parameters:
        end = offset + parameter.numel()
        parameter.data = flat.data[offset:end].view(parameter.shape)
        parameter.grad = flat.grad[offset:end].view(parameter.shape)
        offset = end
    return flat


# --- projections of one input, side by side ---


def base_of(layer: nn.Module) -> nn.Module:
    """Return the frozen layer under PEFT's, or the layer itself where it has no LoRA."""
    return layer.base_layer if isinstance(layer, LoraLayer) else layer


def transformer_blocks(unet: nn.Module) -> list[BasicTransformerBlock]:
    """Return the transformer blocks, in the model's own order."""
    return [module for module in unet.modules() if isinstance(module, BasicTransformerBlock)]


def projection_groups(unet: nn.Module) -> list[list[nn.Module]]:
    """Return the layers that share an input and a shape.

    These are q, k and v of each self-attention, and the k and v of all attentions to the text of one width.
    """
    to_text, groups = {}, []
    for block in transformer_blocks(unet):
        to_text.setdefault(base_of(block.attn2.to_k).out_features, []).extend([block.attn2.to_k, block.attn2.to_v])
        groups.append([block.attn1.to_q, block.attn1.to_k, block.attn1.to_v])
    return [group for group in (*to_text.values(), *groups) if _alike(group)]


def _alike(layers: list[nn.Module]) -> bool:
    bases = [base_of(layer) for layer in layers]
    return (
        all(base.bias is None for base in bases)
        and len({(base.in_features, base.out_features) for base in bases}) == 1
        and len({isinstance(layer, LoraLayer) for layer in layers}) == 1
    )


def all_projections(unet: nn.Module) -> list[list[nn.Module]]:
    """Return the groups whose layers can be one product, and every other layer with a LoRA as a group of its own.

    Layers that can be no product, and have no LoRA, are in none. The layers stand in one order whether they can be one
    product or not (quantized ones cannot).
    """
    groups = projection_groups(unet)
    grouped = {id(layer) for group in groups for layer in group}
    apart = {id(group[0]): [[m] for m in group if isinstance(m, LoraLayer)] for group in groups}
    together = [part for group in groups for part in ([group] if _can_stack(group) else apart[id(group[0])])]
    return together + [[m] for m in unet.modules() if isinstance(m, LoraLayer) and id(m) not in grouped]


def _can_stack(layers: list[nn.Module]) -> bool:
    return all(type(base_of(layer)) is nn.Linear for layer in layers)


def flat_order(unet: nn.Module, *text_encoders: nn.Module) -> list[nn.Parameter]:
    """Return the LoRA's parameters as the flat one holds them: all lora_A, then all lora_B, group by group.

    The matrices of a group are then one matrix, without a copy. Those of text encoders follow, in their own order.
    """
    of_text = list(trainable_parameters(*text_encoders).values())
    layers = [layer for group in all_projections(unet) for layer in group if isinstance(layer, LoraLayer)]
    all_A, all_B = ([getattr(layer, side)["default"].weight for layer in layers] for side in ("lora_A", "lora_B"))
    return [*all_A, *all_B, *of_text]


@torch.no_grad()
def stack_weights(unet: nn.Module, device: torch.device) -> None:
    """Move the weights of each group into one tensor on a device, of which they become views.

    Before the rest of the UNet moves there, so that nothing is there twice.
    """
    for group in filter(_can_stack, projection_groups(unet)):
        weights = [base_of(layer).weight for layer in group]
        rows, columns = weights[0].shape
        stack = torch.empty(len(group) * rows, columns, dtype=weights[0].dtype, device=device)
        for part, weight in zip(stack.split(rows), weights, strict=True):
            part.copy_(weight)
            weight.data = part


def stacked_weight(layers: list[nn.Module]) -> torch.Tensor:
    """Return the one matrix (n E, D) of which the weights (E, D) of a group's n layers are views.

    Raises:
        RuntimeError: they are not; `stack_weights` comes first.
    """
    weights = [base_of(layer).weight for layer in layers]
    first, (rows, columns) = weights[0], weights[0].shape
    steps = {after.storage_offset() - before.storage_offset() for before, after in pairwise(weights)}
    if len({w.untyped_storage().data_ptr() for w in weights}) > 1 or steps != {rows * columns}:
        raise RuntimeError("the weights of a group are not stacked: call stack_weights first")
    return first.detach().as_strided((len(weights) * rows, columns), (columns, 1), first.storage_offset())


# --- for a while ---


@contextmanager
def adapters_disabled(models: list[torch.nn.Module]) -> Iterator[None]:
    """Run the models without their adapters for a while, as the base model."""
    for model in models:
        model.disable_adapters()
    try:
        yield
    finally:
        for model in models:
            model.enable_adapters()


@contextmanager
def evaluating(models: list[torch.nn.Module]) -> Iterator[None]:
    """Run the models in evaluation mode for a while: no dropout, no gradient checkpointing."""
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for model in models:
            model.train()

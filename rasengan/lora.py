"""Give a frozen model a LoRA through PEFT, and hold all its matrices in one flat parameter."""

import torch
from peft import LoraConfig

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

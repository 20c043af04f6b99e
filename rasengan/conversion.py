"""Write an adapter in another layout: whole or not at all, and read back bit for bit."""

import copy
import re
from pathlib import Path

import torch

from rasengan import UserError, locks
from rasengan.adapter_reader import read_adapter
from rasengan.adapter_writer import same_adapter, write_diffusers, write_kohya, write_peft_folders
from rasengan.adapters import WHOLE_LOKR, Adapter, by_module, kind_of, rank_of, strength_of
from rasengan.families import SDXL, guess_family, not_in_sdxl
from rasengan.files import give_default_mode, sync, writing


LAYOUTS = ("diffusers", "peft", "kohya")


def write_adapter(path: Path, adapter: Adapter, layout: str, dtype: torch.dtype = torch.float32) -> None:
    """Write an adapter whole or not at all, and compare what can be read back of it bit for bit.

    Args:
        path: a file that ends in .safetensors, or for PEFT's layout a folder; nothing is there yet.
        adapter: alpha in kohya's layout is an fp32 tensor; the alpha of an rsLoRA becomes there the one that gives
            the same strength.
        layout: one of `LAYOUTS`.
        dtype: of the weights in the file.

    Raises:
        UserError: the layout or the dtype cannot hold such an adapter, or the place exists or cannot be written.
        RuntimeError: reading back gave another adapter.
    """
    adapter = _cast(adapter, dtype)
    adapter = without_rslora(adapter) if layout == "kohya" else adapter
    check_layout(adapter, layout)
    with writing(path, "Make room, or give another place."), locks.only_writer(path, "--output") as written:
        if layout == "diffusers":
            write_diffusers(written.parent, adapter, path.name)
        elif layout == "kohya":
            write_kohya(written, adapter)
        else:
            write_peft_folders(written, adapter)
        _verify(written, adapter, path)
        for file in [written] if written.is_file() else [file for file in written.rglob("*") if file.is_file()]:
            give_default_mode(file)
            sync(file)


def check_family(adapter: Adapter, place: str) -> None:
    """Check that an adapter is one of SDXL, as far as its names and the width of its text tell.

    Args:
        adapter: of any layout.
        place: where it comes from, for messages.

    Raises:
        UserError: it is not.
    """
    for name, weights in adapter.weights.items():
        family = guess_family(weights)
        if family not in {None, SDXL}:
            raise UserError(f"{place} looks as if made for {family}. Give an SDXL adapter.")
        modules = by_module(weights)
        if strangers := not_in_sdxl(name, modules):
            raise UserError(
                f"{place} holds {len(strangers)} modules of {len(modules)} that no SDXL has, such as the {name}'s "
                f"{strangers[0]}. Give an SDXL adapter."
            )


def check_layout(adapter: Adapter, layout: str) -> None:
    """Check that a layout can hold an adapter of this kind.

    Raises:
        UserError: it cannot.
    """
    for name, config in adapter.configs.items():
        if layout == "diffusers" and kind_of(config) != "LORA":
            raise UserError(
                f"The {name}'s adapter is a {kind_of(config)}, and diffusers' layout holds LoRAs alone. Give --format "
                "peft or kohya."
            )
        for module, parts in by_module(adapter.weights[name]).items():
            whole = parts.keys() == WHOLE_LOKR
            if layout == "kohya" and whole and strength_of(config, module) != 1:
                raise UserError(
                    f"{module} is a LoKr of whole matrices at strength {strength_of(config, module):g}, which kohya's "
                    "layout has at strength 1 alone. Give --format peft."
                )


def without_rslora(adapter: Adapter) -> Adapter:
    """Return the same adapter with the alphas that give an rsLoRA's strength as alpha / rank."""
    configs = {}
    for name, config in adapter.configs.items():
        if getattr(config, "use_rslora", False):
            modules = by_module(adapter.weights[name])
            alphas = {module: strength_of(config, module) * rank_of(config, module) for module in modules}
            config = copy.copy(config)
            config.use_rslora, config.lora_alpha = False, next(iter(alphas.values()))
            config.alpha_pattern = {re.escape(m.removeprefix("text_model.")): alpha for m, alpha in alphas.items()}
        configs[name] = config
    return Adapter(adapter.weights, configs)


def _cast(adapter: Adapter, dtype: torch.dtype) -> Adapter:
    weights = {
        name: {key: tensor.detach().to("cpu", dtype).contiguous() for key, tensor in part.items()}
        for name, part in adapter.weights.items()
    }
    for name, part in weights.items():
        if wrong := next((key for key, tensor in part.items() if not torch.isfinite(tensor).all()), None):
            raise UserError(
                f"The {name}'s {wrong} is not finite in {str(dtype).removeprefix('torch.')}: the adapter is damaged, "
                "or its weights are too great for --dtype. Give fp32, or another adapter."
            )
        whole = adapter.weights[name]
        if lost := next((key for key, tensor in part.items() if whole[key].any() and not tensor.any()), None):
            raise UserError(
                f"The {name}'s {lost} would be all zeros in {str(dtype).removeprefix('torch.')}: its weights are too "
                "small for --dtype. Give fp32."
            )
    return Adapter(weights, adapter.configs)


def _verify(written: Path, adapter: Adapter, path: Path) -> None:
    found = read_adapter(written)
    if not same_adapter(found, adapter):
        raise RuntimeError(f"{path} was not written: reading it back gave another adapter. The disk may be damaged.")

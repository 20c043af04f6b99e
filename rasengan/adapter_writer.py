"""Write an adapter in the layouts of diffusers, PEFT and kohya, alpha with it in each; compare what is read back."""

import math
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from rasengan.adapters import (
    DIFFUSERS_FILE,
    PEFT_FILE,
    PEFT_PREFIX,
    Adapter,
    Config,
    alpha_of,
    by_module,
    default_alpha,
    fit_names,
    kind_of,
    strength_of,
)
from rasengan.naming import KOHYA_PARTS, encoder_name, kohya_name
from rasengan.safetensors_header import sort_metadata


_TEXT_ENCODERS = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
_KOHYA_NAMES = {name: kohya for kohya, name in KOHYA_PARTS.items()}


# --- diffusers ---


def write_diffusers(directory: Path, adapter: Adapter, name: str = DIFFUSERS_FILE) -> None:
    """Write a file as diffusers lays it out, with each LoRA's alpha in its metadata.

    Without the metadata a reload would run at alpha = rank. Equal weights give a byte-identical file.

    Args:
        directory: made if missing.
        adapter: of the unet and perhaps the text encoders.
        name: of the file.
    """
    options = {}
    for component, weights in adapter.weights.items():
        if component != "unet":  # other programs know a text encoder's modules as older transformers named them
            weights = {encoder_name(key): tensor for key, tensor in weights.items()}
        weights = {key: tensor.cpu().contiguous() for key, tensor in weights.items()}
        options[f"{component}_lora_layers"] = _diffusers_names(component, weights)
        options[f"{component}_lora_adapter_metadata"] = adapter.configs[component].to_dict()
    StableDiffusionXLPipeline.save_lora_weights(directory, weight_name=name, **options)
    sort_metadata(directory / name)


def _diffusers_names(component: str, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    names = convert_state_dict_to_diffusers(weights)
    # It gives new names to attention projections alone; of a UNet with both kinds diffusers' loader, in silence, takes
    # only those with the other names. It takes PEFT's for all.
    is_mixed = len({".lora.down." in key for key in names if ".lora.up." not in key and ".lora_B." not in key}) > 1
    return weights if component == "unet" and is_mixed else names


# --- PEFT ---


def write_peft_folders(directory: Path, adapter: Adapter) -> None:
    """Write the UNet's adapter as a PEFT folder, and each text encoder's as one inside it, named after the encoder.

    The names are those of the transformers that is installed, so that `PeftModel.from_pretrained` finds every module.
    """
    for name, weights in adapter.weights.items():
        if name != "unet":
            with torch.device("meta"):
                weights = fit_names(weights, _TEXT_ENCODERS[name](CLIPTextConfig(num_hidden_layers=1)))
        write_peft(directory if name == "unet" else directory / name, weights, adapter.configs[name])


def write_peft(folder: Path, weights: dict[str, torch.Tensor], config: Config) -> None:
    """Write weights of one component, by name, and their configuration as a PEFT folder, made if missing."""
    folder.mkdir(parents=True, exist_ok=True)
    # PeftModel.from_pretrained only warns about keys without this prefix, and leaves lora_B at zero.
    tensors = {PEFT_PREFIX + key: tensor.cpu().contiguous() for key, tensor in weights.items()}
    save_file(tensors, folder / PEFT_FILE, metadata={"format": "pt"})
    config.save_pretrained(folder)


# --- kohya ---


def write_kohya(file: Path, adapter: Adapter) -> None:
    """Write a file as kohya's sd-scripts lay it out for SDXL, with each module's alpha as an fp32 tensor.

    Args:
        file: its folder exists.
        adapter: none of it an rsLoRA: the layout's strength is alpha / rank.
    """
    tensors = {}
    for component, weights in adapter.weights.items():
        config = adapter.configs[component]
        for module, parts in by_module(weights).items():
            name = kohya_name(component, module)
            for part, tensor in parts.items():
                tensor = _kohya_shape(tensor) if part == "lora_magnitude_vector" else tensor
                tensors[f"{name}.{_KOHYA_NAMES.get(part, part)}"] = tensor.cpu().contiguous()
            tensors[f"{name}.alpha"] = torch.tensor(alpha_of(config, module), dtype=torch.float32)
    config = next(iter(adapter.configs.values()))
    metadata = {
        "format": "pt",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        # By which AUTOMATIC1111 lists it among the adapters of SDXL.
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_network_module": "networks.lora" if kind_of(config) == "LORA" else "lycoris.kohya",
        "ss_network_dim": str(config.r),
        "ss_network_alpha": str(default_alpha(config)),
    }
    save_file(tensors, file, metadata=metadata)
    sort_metadata(file)


def _kohya_shape(magnitude: torch.Tensor) -> torch.Tensor:
    """Return DoRA's vector, (out,) or of a convolution (1, out, 1, 1), in kohya's shape, which begins with out."""
    return magnitude[:, None] if magnitude.ndim == 1 else magnitude.transpose(0, 1)


# --- what is read back ---


def same_adapter(one: Adapter, other: Adapter) -> bool:
    """Say whether two adapters have the same bits in every weight, and the same strength to what fp32 can say.

    They may lie on different devices.
    """
    if one.weights.keys() != other.weights.keys():
        return False
    for name in one.weights:
        left, right = (
            {key.removeprefix("text_model."): tensor.cpu() for key, tensor in adapter.weights[name].items()}
            for adapter in (one, other)
        )
        if left.keys() != right.keys() or not all(torch.equal(left[key], right[key]) for key in left):
            return False
        for module in by_module(left):
            strengths = [strength_of(config, module) for config in (one.configs[name], other.configs[name])]
            if not math.isclose(*strengths, rel_tol=1e-6):
                return False
    return True

"""Are the components of one SDXL base, as far as their configurations tell?"""

from collections.abc import Mapping
from pathlib import Path

from rasengan import UserError
from rasengan.components import MODELS, read_config
from rasengan.families import OTHER_FAMILIES
from rasengan.sources import COMPONENT_FLAGS, TEXT_ENCODERS, TOKENIZERS, Source, config_name, fetch


MOST_TIMESTEPS = 10**5
MOST_LAYERS = 1000  # of a text encoder; SDXL's have 12 and 32


def fetch_checked(sources: Mapping[str, Source]) -> dict[str, Path]:
    """Fetch the configurations of components alone, check them, and return their folders.

    Raises:
        UserError: one cannot be fetched, or as `check_components`.
    """
    folders = {name: fetch(name, source, weights=False) for name, source in sources.items()}
    check_components(folders)
    return folders


def check_components(folders: dict[str, Path]) -> None:
    """Check by their configurations alone that the components are of one SDXL base model.

    Args:
        folders: the folder of each component, or of some of them; what is absent is not checked, nor tokenizers.

    Raises:
        UserError: one is of another class or family, or its sizes do not fit the others'.
    """
    configs = {name: read_config(name, folder) for name, folder in folders.items() if name not in TOKENIZERS}
    if "scheduler" in configs:
        _check_scheduler(configs.pop("scheduler"), folders)
    _check_classes(configs, folders)
    _check_layers(configs, folders)
    if "vae" in configs:
        _check_vae(configs["vae"], folders)
    if "unet" in configs:
        _check_unet(configs["unet"], folders)
        _check_widths(folders)


def _wrong(component: str, folders: dict[str, Path], found: str, of_base: bool = False) -> UserError:
    """Return the refusal of what is found in a component's folder; `of_base` where the base may be what is wrong."""
    base = "--pretrained_model_name_or_path or " if of_base else ""
    return UserError(f"{folders[component]} holds a {found}. Correct {base}{COMPONENT_FLAGS[component]}.")


def _check_scheduler(config: dict, folders: dict[str, Path]) -> None:
    if "beta_schedule" not in config or str(config.get("_class_name")).startswith("FlowMatch"):
        has = f"with{'' if 'beta_schedule' in config else 'out'} a beta_schedule"
        found = f"{config.get('_class_name')} {has}, as of SD 3 or Flux, not the scheduler of a diffusion model"
        raise _wrong("scheduler", folders, found)
    timesteps = config.get("num_train_timesteps", 1000)
    if type(timesteps) is not int or not 2 <= timesteps <= MOST_TIMESTEPS:
        raise _wrong("scheduler", folders, f"scheduler of {timesteps!r} num_train_timesteps; SDXL's has 1000")


def _check_classes(configs: dict[str, dict], folders: dict[str, Path]) -> None:
    for component, config in configs.items():
        expected = MODELS[component].__name__
        architectures = config.get("architectures")
        known = architectures[0] if isinstance(architectures, list) and architectures else "model of no named class"
        found = config.get("_class_name") or known
        if found != expected:
            raise _wrong(component, folders, f"{found}, not SDXL's {component} ({expected})", of_base=True)
        if config.get("quantization_config") is not None:
            raise UserError(
                f"{folders[component]} holds a {component} that is quantized already (quantization_config). Give one "
                "in fp16, bf16 or fp32; --base_quantization nf4 quantizes the UNet in training."
            )


def _check_layers(configs: dict[str, dict], folders: dict[str, Path]) -> None:
    for component in TEXT_ENCODERS:
        layers = configs.get(component, {}).get("num_hidden_layers", 1)
        if type(layers) is not int or not 1 <= layers <= MOST_LAYERS:
            found = f"{component} of {layers!r} num_hidden_layers; SDXL's have 12 and 32"
            raise _wrong(component, folders, found)


def _check_vae(config: dict, folders: dict[str, Path]) -> None:
    factor = config.get("scaling_factor")
    if factor is None:
        found = "VAE without a scaling_factor, as of Stable Diffusion 1.x; SDXL's is 0.13025"
        raise _wrong("vae", folders, found)
    if not _is_positive(factor):
        raise _wrong("vae", folders, f"VAE whose scaling_factor is {factor!r}; SDXL's is 0.13025")
    if any(config.get(name) is not None for name in ("latents_mean", "latents_std", "shift_factor")):
        found = "VAE with latents_mean, latents_std or a shift_factor, as Playground's and SD 3's"
        raise _wrong("vae", folders, f"{found}, by which SDXL's latents are not scaled")


def _check_unet(config: dict, folders: dict[str, Path]) -> None:
    if config.get("time_cond_proj_dim") is not None:
        raise UserError(
            f"{folders['unet']} holds a UNet that is told the guidance scale (time_cond_proj_dim), as a latent "
            "consistency model's is, which SDXL's is not. Give the base that it was made from, and an LCM-LoRA."
        )
    width = _setting("unet", folders, "cross_attention_dim")
    if config.get("addition_embed_type") != "text_time":
        family = OTHER_FAMILIES.get(width, "another model family")
        found = f"UNet of {family}: it takes text of width {width} and no size conditioning"
        takes = "SDXL's takes both encoders' and the picture's size"
        raise _wrong("unet", folders, f"{found}, {takes}", of_base=True)
    in_channels = _setting("unet", folders, "in_channels")
    if in_channels != 4:
        found = f"UNet with {in_channels} input channels (inpainting or editing), not the base model's 4"
        raise _wrong("unet", folders, found, of_base=True)


def _check_widths(folders: dict[str, Path]) -> None:
    """Check what the UNet takes against what the others give, as far as they are there."""
    if all(name in folders for name in TEXT_ENCODERS):
        width = _setting("unet", folders, "cross_attention_dim")
        text_width = sum(_setting(name, folders, "hidden_size") for name in TEXT_ENCODERS)
        if width != text_width:
            family = f" (as {OTHER_FAMILIES[width]} does)" if width in OTHER_FAMILIES else ""
            raise UserError(
                f"{folders['unet']} holds a UNet that takes text of width {width}{family}, but the text encoders "
                f"give {text_width}. Give a UNet and text encoders of the same SDXL base model."
            )
    if "text_encoder_2" in folders:
        added_width = _setting("unet", folders, "projection_class_embeddings_input_dim")
        pooled_width = added_width - 6 * _setting("unet", folders, "addition_time_embed_dim")
        given_width = _setting("text_encoder_2", folders, "projection_dim")
        if pooled_width != given_width:
            raise UserError(
                f"{folders['unet']} holds a UNet for a pooled text width of {pooled_width}, but the text_encoder_2 "
                f"gives {given_width}. Give both of the same SDXL base model."
            )
    if "vae" in folders:
        latent_channels = _setting("vae", folders, "latent_channels")
        in_channels = _setting("unet", folders, "in_channels")
        if latent_channels != in_channels:
            found = f"VAE with {latent_channels} latent channels, but the UNet takes {in_channels}"
            raise _wrong("vae", folders, found)


def _is_positive(value: object) -> bool:
    return type(value) in {int, float} and 1e-6 < value < 1e6  # which NaN is not either


def _setting(component: str, folders: dict[str, Path], name: str) -> int:
    value = read_config(component, folders[component]).get(name)
    if not isinstance(value, int):
        raise UserError(
            f"{folders[component] / config_name(component)} has no {name} as SDXL's has, but {value!r}. Fetch the "
            f"{component} again, or correct {COMPONENT_FLAGS[component]}."
        )
    return value

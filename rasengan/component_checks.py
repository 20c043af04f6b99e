"""Are the components of one SDXL base, as far as their configurations tell?"""

from pathlib import Path

from rasengan import UserError
from rasengan.components import COMPONENT_FLAGS, MODELS, TEXT_ENCODERS, TOKENIZERS, config_name, read_config
from rasengan.families import OTHER_FAMILIES


MOST_TIMESTEPS = 10**5
MOST_LAYERS = 1000  # of a text encoder; SDXL's have 12 and 32


def check_components(folders: dict[str, Path]) -> None:
    """Check by their configurations alone that the components are of one SDXL base model.

    Args:
        folders: the folder of each component, or of some of them; what is absent is not checked, nor tokenizers.

    Raises:
        UserError: one is of another class or family, or its sizes do not fit the others'.
    """
    configs = {name: read_config(name, folder) for name, folder in folders.items() if name not in TOKENIZERS}
    scheduler = configs.pop("scheduler", {"beta_schedule": None})
    if "beta_schedule" not in scheduler or str(scheduler.get("_class_name")).startswith("FlowMatch"):
        raise UserError(
            f"{folders['scheduler']} holds a {scheduler.get('_class_name')} with"
            f"{'' if 'beta_schedule' in scheduler else 'out'} a beta_schedule, as of SD 3 or Flux, not the scheduler "
            f"of a diffusion model. Correct {COMPONENT_FLAGS['scheduler']}."
        )
    timesteps = scheduler.get("num_train_timesteps", 1000)
    if type(timesteps) is not int or not 2 <= timesteps <= MOST_TIMESTEPS:
        raise UserError(
            f"{folders['scheduler']} holds a scheduler of {timesteps!r} num_train_timesteps; SDXL's has 1000. Correct "
            f"{COMPONENT_FLAGS['scheduler']}."
        )
    for component, config in configs.items():
        expected = MODELS[component].__name__
        architectures = config.get("architectures")
        known = architectures[0] if isinstance(architectures, list) and architectures else "model of no named class"
        found = config.get("_class_name") or known
        if found != expected:
            raise UserError(
                f"{folders[component]} holds a {found}, not SDXL's {component} ({expected}). Correct "
                f"--pretrained_model_name_or_path or {COMPONENT_FLAGS[component]}."
            )
        if config.get("quantization_config") is not None:
            raise UserError(
                f"{folders[component]} holds a {component} that is quantized already (quantization_config). Give one "
                "in fp16, bf16 or fp32; --base_quantization nf4 quantizes the UNet in training."
            )
    for component in TEXT_ENCODERS:
        layers = configs.get(component, {}).get("num_hidden_layers", 1)
        if type(layers) is not int or not 1 <= layers <= MOST_LAYERS:
            raise UserError(
                f"{folders[component]} holds a {component} of {layers!r} num_hidden_layers; SDXL's have 12 and 32. "
                f"Correct {COMPONENT_FLAGS[component]}."
            )
    if "vae" in configs and configs["vae"].get("scaling_factor") is None:
        raise UserError(
            f"{folders['vae']} holds a VAE without a scaling_factor, as of Stable Diffusion 1.x; SDXL's is 0.13025. "
            f"Correct {COMPONENT_FLAGS['vae']}."
        )
    if "vae" in configs and not _is_positive(configs["vae"]["scaling_factor"]):
        raise UserError(
            f"{folders['vae']} holds a VAE whose scaling_factor is {configs['vae']['scaling_factor']!r}; SDXL's is "
            f"0.13025. Correct {COMPONENT_FLAGS['vae']}."
        )
    if "vae" in configs and any(
        configs["vae"].get(name) is not None for name in ("latents_mean", "latents_std", "shift_factor")
    ):
        raise UserError(
            f"{folders['vae']} holds a VAE with latents_mean, latents_std or a shift_factor, as Playground's and SD "
            f"3's, by which SDXL's latents are not scaled. Correct {COMPONENT_FLAGS['vae']}."
        )
    unet = configs.get("unet")
    if unet is None:
        return
    if unet.get("time_cond_proj_dim") is not None:
        raise UserError(
            f"{folders['unet']} holds a UNet that is told the guidance scale (time_cond_proj_dim), as a latent "
            "consistency model's is, which SDXL's is not. Give the base that it was made from, and an LCM-LoRA."
        )
    correct = f"Correct --pretrained_model_name_or_path or {COMPONENT_FLAGS['unet']}."
    width = _setting("unet", folders, "cross_attention_dim")
    if unet.get("addition_embed_type") != "text_time":
        family = OTHER_FAMILIES.get(width, "another model family")
        raise UserError(
            f"{folders['unet']} holds a UNet of {family}: it takes text of width {width} and no size "
            f"conditioning, SDXL's takes both encoders' and the picture's size. {correct}"
        )
    in_channels = _setting("unet", folders, "in_channels")
    if in_channels != 4:
        raise UserError(
            f"{folders['unet']} holds a UNet with {in_channels} input channels (inpainting or editing), "
            f"not the base model's 4. {correct}"
        )
    if "text_encoder" in configs and "text_encoder_2" in configs:
        text_width = sum(_setting(name, folders, "hidden_size") for name in TEXT_ENCODERS)
        if width != text_width:
            family = f" (as {OTHER_FAMILIES[width]} does)" if width in OTHER_FAMILIES else ""
            raise UserError(
                f"{folders['unet']} holds a UNet that takes text of width {width}{family}, but the text encoders "
                f"give {text_width}. Give a UNet and text encoders of the same SDXL base model."
            )
    if "text_encoder_2" in configs:
        added_width = _setting("unet", folders, "projection_class_embeddings_input_dim")
        pooled_width = added_width - 6 * _setting("unet", folders, "addition_time_embed_dim")
        given_width = _setting("text_encoder_2", folders, "projection_dim")
        if pooled_width != given_width:
            raise UserError(
                f"{folders['unet']} holds a UNet for a pooled text width of {pooled_width}, but the text_encoder_2 "
                f"gives {given_width}. Give both of the same SDXL base model."
            )
    if "vae" in configs and (latent_channels := _setting("vae", folders, "latent_channels")) != in_channels:
        raise UserError(
            f"{folders['vae']} holds a VAE with {latent_channels} latent channels, but the UNet "
            f"takes {in_channels}. Correct {COMPONENT_FLAGS['vae']}."
        )


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

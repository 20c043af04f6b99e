"""What the configurations of SDXL's components say, and how each is loaded: by itself, in its precision."""

import hashlib
import json
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, DDPMScheduler, SchedulerMixin, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from rasengan import UserError, first_line, objective
from rasengan.files import read_json_or_empty
from rasengan.sources import COMPONENT_FLAGS, COMPONENTS, TEXT_ENCODERS, TOKENIZERS, component_files, config_name


MODELS = {
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
    "vae": AutoencoderKL,
    "unet": UNet2DConditionModel,
}
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json")
MOST_TOKENS = 77  # that CLIP's text encoders see
ATTENTION = "sdpa"  # whatever a configuration says, which may name a kernel that the hub would send
SAMPLES, SAMPLE_BYTES = 64, 2**16


def disable_progress_bars() -> None:
    """Keep diffusers and transformers from showing bars of their own while they load weights."""
    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()


def sampled_digest(folders: dict[str, Path], variant: str | None) -> str:
    """Return a digest of a base: its settings, and of each file of weights the size and 4 MiB, evenly spread.

    That is soon done where reading all takes a minute, and sees another model, or one that something was merged into.
    What a configuration says of who wrote it and where, by names that begin with _, may differ.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name in COMPONENTS:
        for file in component_files(name, folders[name], variant):
            if file.suffix == ".safetensors":
                size = file.stat().st_size
                digest.update(f"{name} {size} ".encode())
                with open(file, "rb") as content:
                    for number in range(SAMPLES):
                        content.seek(number * size // SAMPLES)
                        digest.update(content.read(SAMPLE_BYTES))
            elif file.name in (*TOKENIZER_FILES, config_name(name)):
                digest.update(f"{name} {file.name} ".encode() + _settings(file))
    return digest.hexdigest()


def _settings(file: Path) -> bytes:
    content = file.read_bytes()
    try:
        found = json.loads(content)
    except (RecursionError, ValueError):  # merges.txt is no JSON
        return content
    if isinstance(found, dict):
        found = {key: value for key, value in found.items() if not key.startswith("_") or key == "_class_name"}
    return json.dumps(found, sort_keys=True).encode()


def read_config(component: str, folder: Path) -> dict:
    """Return a component's configuration file as a dictionary.

    Raises:
        UserError: it is not JSON.
    """
    file = folder / config_name(component)
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (RecursionError, ValueError) as error:  # of nested brackets, of bytes or JSON, of endless digits
        raise UserError(f"{file} is not JSON ({first_line(error)}). Fetch the {component} again.") from error
    if not isinstance(config, dict):
        raise UserError(f"{file} is not a configuration, but a {type(config).__name__}. Fetch the {component} again.")
    return config


def negative_prompt(given: str | None, folders: dict[str, Path]) -> str | None:
    """Return the negative prompt to encode; None for zeros, which stand for none where the base says so."""
    return "" if given is None and not forces_zeros(folders) else given


def forces_zeros(folders: dict[str, Path]) -> bool:
    """Say whether no negative prompt stands for zeros, as in SDXL 1.0, or for the embeddings of an empty text.

    Of the index of the pipeline in which the UNet lies; without one, zeros.
    """
    index = read_json_or_empty(folders["unet"].parent / "model_index.json")
    return bool(index.get("force_zeros_for_empty_prompt", True))


def skeleton(component: str, folder: Path) -> torch.nn.Module:
    """Return a model of a folder on the meta device: every name and shape, no memory."""
    config = read_config(component, folder)
    with torch.device("meta"):
        if component in TEXT_ENCODERS:
            config = {name: value for name, value in config.items() if "attn_implementation" not in name}
            return MODELS[component](CLIPTextConfig(**config, attn_implementation=ATTENTION))
        return MODELS[component].from_config(config)


# --- precision ---


def weight_dtype(mixed_precision: str, device: torch.device) -> torch.dtype:
    """Return the dtype of the frozen UNet and text encoders.

    The VAE is always fp32 (SDXL's overflows in fp16), and so are the trainable weights.

    Args:
        mixed_precision: "no", "fp16" or "bf16".
        device: where they run.

    Raises:
        UserError: the device cannot run this precision.
    """
    if mixed_precision == "fp16" and device.type == "cpu":
        raise UserError("fp16 was asked for, but this run is on a CPU. Use --mixed_precision no.")
    if mixed_precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(False):
        raise UserError(
            f"bf16 was asked for, but {torch.cuda.get_device_name(device)} does not have it. "
            "Use --mixed_precision fp16."
        )
    dtypes = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    if mixed_precision not in dtypes:
        raise UserError(f"mixed precision is {mixed_precision!r}. Use one of {', '.join(dtypes)}.")
    return dtypes[mixed_precision]


# --- loading ---


def load(component: str, folder: Path, dtype: torch.dtype = torch.float32, variant: str | None = None):
    """Load one component from its own folder, frozen and on the CPU.

    A model is cast tensor by tensor while it is read: it never exists in the precision of its file.

    Args:
        component: one of `COMPONENTS`.
        folder: what `sources.fetch` returned.
        dtype: of the UNet and the text encoders; the VAE is loaded in fp32 whatever it says.
        variant: of the weight files, "fp16" say.

    Raises:
        UserError: the weights are damaged or do not fit their configuration.
    """
    options = {"variant": variant, "use_safetensors": True, "low_cpu_mem_usage": True, "output_loading_info": True}
    options["dtype" if component in TEXT_ENCODERS else "torch_dtype"] = torch.float32 if component == "vae" else dtype
    if component in TEXT_ENCODERS:
        options["attn_implementation"] = ATTENTION
    absent = []
    scheduler_class = _scheduler_class(folder) if component == "scheduler" else None
    try:
        if scheduler_class is not None:
            return scheduler_class.from_pretrained(str(folder))
        if component in TOKENIZERS:
            tokenizer = CLIPTokenizer.from_pretrained(str(folder))
            # Without a length in its settings it has an endless one.
            tokenizer.model_max_length = min(tokenizer.model_max_length, MOST_TOKENS)
            if tokenizer.model_max_length < MOST_TOKENS:
                raise ValueError(f"its model_max_length is {tokenizer.model_max_length}; SDXL's is {MOST_TOKENS}.")
            return tokenizer
        model, report = MODELS[component].from_pretrained(str(folder), **options)
        absent = sorted(report["missing_keys"])
    except Exception as error:  # the loaders raise OSError, ValueError, RuntimeError and SafetensorError alike
        raise _damaged(component, folder, first_line(error)) from error
    if absent:  # the loaders only warn, and leave these at random values
        raise _damaged(component, folder, f"{len(absent)} tensors are missing, such as {absent[0]}.")
    return model.requires_grad_(False).eval()


def _damaged(component: str, folder: Path, reason: str) -> UserError:
    return UserError(
        f"The {component} in {folder} cannot be loaded: {reason.rstrip('.')}. Fetch it again, or correct "
        f"{COMPONENT_FLAGS[component]}."
    )


def load_text_encoders(
    folders: dict[str, Path], variant: str | None, device: torch.device, dtype: torch.dtype
) -> tuple[list, list]:
    """Load both tokenizers and both text encoders, one after the other, onto a device."""
    text_encoders = [
        load(name, folders[name], dtype, variant).to(device) for name in ("text_encoder", "text_encoder_2")
    ]
    return [load(name, folders[name]) for name in TOKENIZERS], text_encoders


def load_scheduler(folder: Path, prediction_type: str | None) -> SchedulerMixin:
    """Load the base's scheduler, with the prediction type of a training; None for the scheduler's own.

    Raises:
        UserError: it cannot be loaded, or there is no target for its prediction type.
    """
    scheduler = load("scheduler", folder)
    # A scheduler that does not know the setting is of the noise's kind.
    prediction_type = prediction_type or scheduler.config.get("prediction_type", "epsilon")
    scheduler.register_to_config(prediction_type=objective.check_prediction_type(prediction_type))
    return scheduler


def noise_levels(scheduler: SchedulerMixin) -> torch.Tensor:
    """Return what is left of the picture at each timestep of the training, the squared share, (num_train_timesteps,).

    Raises:
        UserError: the scheduler's settings give none.
    """
    levels = DDPMScheduler.from_config(scheduler.config).alphas_cumprod
    if not torch.isfinite(levels).all():
        raise UserError(f"The scheduler's betas give no noise levels. Correct {COMPONENT_FLAGS['scheduler']}.")
    return levels


def _scheduler_class(folder: Path) -> type[SchedulerMixin]:
    name = read_config("scheduler", folder).get("_class_name")
    found = getattr(diffusers, str(name), None)
    if not (isinstance(found, type) and issubclass(found, SchedulerMixin)):
        raise UserError(
            f"{folder} names the scheduler class {name!r}, which diffusers does not have. Correct "
            f"{COMPONENT_FLAGS['scheduler']}."
        )
    return found

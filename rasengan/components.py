"""Where each SDXL component is, whether it fits the others, and how it is loaded: by itself, in its precision."""

import fnmatch
import hashlib
import json
import shlex
from pathlib import Path
from typing import NamedTuple

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, DDPMScheduler, SchedulerMixin, UNet2DConditionModel
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from rasengan import UserError, first_line, objective
from rasengan.files import read_json_or_empty


MODELS = {
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
    "vae": AutoencoderKL,
    "unet": UNet2DConditionModel,
}
TOKENIZERS = ("tokenizer", "tokenizer_2")
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
COMPONENTS = (*TOKENIZERS, *MODELS, "scheduler")

# The flag that gives a component a place of its own. The VAE's is diffusers' name for it.
COMPONENT_FLAGS = {name: f"--pretrained_{name}_name_or_path" for name in COMPONENTS if name != "vae"} | {
    "vae": "--pretrained_vae_model_name_or_path"
}


SDXL_ID = "stabilityai/stable-diffusion-xl-base-1.0"
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json")
MOST_TOKENS = 77  # that CLIP's text encoders see
ATTENTION = "sdpa"  # whatever a configuration says, which may name a kernel that the hub would send
SAMPLES, SAMPLE_BYTES = 64, 2**16


class Source(NamedTuple):
    """Where a component's files are: a local folder or a hub repository."""

    name_or_path: str
    subfolder: str | None = None
    revision: str | None = None
    variant: str | None = None
    cache_dir: str | None = None


# --- where components are ---


def sources_of(settings: dict[str, object]) -> dict[str, Source]:
    """Return the source of each component as settings say it, by the names of their flags.

    Raises:
        UserError: a component has none.
    """
    overrides = {name: settings[flag.removeprefix("--")] for name, flag in COMPONENT_FLAGS.items()}
    how = (settings[name] for name in ("revision", "variant", "cache_dir"))
    return component_sources(settings["pretrained_model_name_or_path"], overrides, *how)


def component_sources(
    base: str | None,
    overrides: dict[str, str | None],
    revision: str | None = None,
    variant: str | None = None,
    cache_dir: str | None = None,
) -> dict[str, Source]:
    """Return the source of each component: its own place where `overrides` names one, else its folder in `base`.

    Raises:
        UserError: a component has neither.
    """
    sources = {}
    for component in COMPONENTS:
        if overrides.get(component):
            sources[component] = Source(overrides[component], None, revision, variant, cache_dir)
        elif base:
            sources[component] = Source(base, component, revision, variant, cache_dir)
        else:
            raise UserError(
                f"There is no source for the {component}. Give --pretrained_model_name_or_path, or "
                f"{COMPONENT_FLAGS[component]} for this component alone."
            )
    return sources


def disable_progress_bars() -> None:
    """Keep diffusers and transformers from showing bars of their own while they load weights."""
    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()


def fetch(component: str, source: Source, weights: bool = True) -> Path:
    """Return the local folder of a component, downloading it from the hub first where it is not local.

    With `weights=False` only its configuration is fetched, so that a wrong model is refused before gigabytes move.

    Raises:
        UserError: there is no such folder or repository, or it holds no such component, or no safetensors weights.
    """
    root = Path(source.name_or_path).expanduser()
    patterns = _weight_patterns(source.variant) if weights and component in MODELS else []
    if not root.is_dir():
        root = _download(component, source, patterns)
    folder = root / source.subfolder if source.subfolder else root
    if not (folder / config_name(component)).is_file():
        if source.subfolder is None and (root / component).is_dir():
            return fetch(component, source._replace(subfolder=component), weights)
        raise UserError(
            f"{folder} holds no {component}: it has no {config_name(component)}. Give the folder that has it by "
            f"{COMPONENT_FLAGS[component]}, or a base by --pretrained_model_name_or_path."
        )
    names = {file.name for file in folder.iterdir()}
    if component in TOKENIZERS and not ("tokenizer.json" in names or {"vocab.json", "merges.txt"} <= names):
        raise UserError(
            f"{folder} holds no tokenizer.json, and not both vocab.json and merges.txt, for the {component}. Fetch it "
            f"again, or give another folder by {COMPONENT_FLAGS[component]}."
        )
    if patterns and not any(fnmatch.filter(names, p) for p in patterns):
        found = sorted(name for name in names if name.endswith((".safetensors", ".bin", ".ckpt")))
        pickled = found and not any(name.endswith(".safetensors") for name in found)
        remedy = "Drop --variant" if source.variant and not pickled else "Save it as safetensors"
        raise UserError(
            f"{folder} holds no {' or '.join(patterns[:2])} for the {component}; its weight files are: "
            f"{', '.join(found) or 'none'}. {remedy}, or give another folder by {COMPONENT_FLAGS[component]}."
        )
    return folder


def config_name(component: str) -> str:
    """Return the name of a component's configuration file."""
    if component in TOKENIZERS:
        return "tokenizer_config.json"
    return "scheduler_config.json" if component == "scheduler" else "config.json"


def _weight_patterns(variant: str | None) -> list[str]:
    shard = "-?????-of-?????"
    stems = ("diffusion_pytorch_model", "model")
    if variant is None:
        return [f"{stem}{part}.safetensors" for part in ("", shard) for stem in stems]
    endings = (f".{variant}", f".{variant}{shard}", f"{shard}.{variant}")
    return [f"{stem}{ending}.safetensors" for ending in endings for stem in stems]


def _download(component: str, source: Source, weight_patterns: list[str]) -> Path:
    name = source.name_or_path
    if Path(name).expanduser().is_file():
        command = f"python scripts/convert.py --input {shlex.quote(name)} --base {SDXL_ID} --format pipeline"
        raise UserError(
            f"{name} is a file, where the {component}'s folder is to be. Of an SDXL in one .safetensors file make a "
            f"folder: `{command} --output FOLDER`."
        )
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise UserError(
            f"{name} is neither a folder nor a hub id, so there is no {component}. Correct "
            f"--pretrained_model_name_or_path or {COMPONENT_FLAGS[component]}."
        ) from None
    # A repository of one component has its files at the top, one of several has them in a folder.
    folders = [f"{source.subfolder}/"] if source.subfolder else ["", f"{component}/"]
    patterns = [folder + pattern for folder in folders for pattern in ("*.json", "*.txt", *weight_patterns)]
    patterns.append("model_index.json")
    return from_hub(name, component, patterns, source.cache_dir, source.revision)


def from_hub(
    repository: str, what: str, patterns: list[str], cache_dir: str | None, revision: str | None = None
) -> Path:
    """Return the local folder of a hub repository, with its files of some patterns downloaded.

    Args:
        repository: a valid name of one.
        what: "unet" or "adapter", say, for messages.
        patterns: as fnmatch takes them; * fits a / too.
        cache_dir: where downloads go.
        revision: a branch, a tag or a commit.

    Raises:
        UserError: the hub does not give it, or there is no room for it.
    """
    try:
        return Path(snapshot_download(repository, revision=revision, cache_dir=cache_dir, allow_patterns=patterns))
    # What answers may be a gateway's page, or JSON of another kind.
    except (HfHubHTTPError, LocalEntryNotFoundError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise not_given(repository, f"{what} at --revision {revision}" if revision else what, error) from error
    except UnicodeEncodeError as error:  # of the request's header
        raise UserError(
            "The token of HF_TOKEN or `hf auth login` holds a letter that no token does (it is not shown here). Copy "
            "it again."
        ) from error
    except OSError as error:
        raise UserError(
            f"The {what} of {repository} cannot be downloaded: {error.strerror or first_line(error)}. Make room, or "
            "give another --cache_dir."
        ) from error


def not_given(repository: str, what: str, error: Exception) -> UserError:
    """Return the error for what the hub did not give: it has no such thing, or keeps it, or does not answer."""
    return UserError(
        f"{repository} is no path here, and the hub did not give its {what}: {first_line(error).rstrip('.')}. Correct "
        "the name, log in with `hf auth login` if it is private, or give a local path."
    )


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


def component_files(component: str, folder: Path, variant: str | None = None) -> list[Path]:
    """Return the files of a component that `load` reads, sorted by name."""
    patterns = ["config.json", *_weight_patterns(variant)] if component in MODELS else ["*.json", "*.txt"]
    return sorted(file for file in folder.iterdir() if any(fnmatch.fnmatch(file.name, p) for p in patterns))


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
        folder: what `fetch` returned.
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

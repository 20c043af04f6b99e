"""Where SDXL's components come from, each by a flag of its own or a base's; and the files they have there."""

import fnmatch
import re
import shlex
from pathlib import Path
from typing import NamedTuple

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open

from rasengan import UserError, first_line
from rasengan.downloads import from_hub


TOKENIZERS = ("tokenizer", "tokenizer_2")
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
WITH_WEIGHTS = (*TEXT_ENCODERS, "vae", "unet")
COMPONENTS = (*TOKENIZERS, *WITH_WEIGHTS, "scheduler")

# The flag that gives a component a place of its own. The VAE's is diffusers' name for it.
COMPONENT_FLAGS = {name: f"--pretrained_{name}_name_or_path" for name in COMPONENTS if name != "vae"} | {
    "vae": "--pretrained_vae_model_name_or_path"
}
SHARD = re.compile(r"-(\d{5})-of-(\d{5})")  # in the name of one of several files of weights
SDXL_ID = "stabilityai/stable-diffusion-xl-base-1.0"


class Source(NamedTuple):
    """Where a component's files are: a local folder or a hub repository."""

    name_or_path: str
    subfolder: str | None = None
    revision: str | None = None
    variant: str | None = None
    cache_dir: str | None = None


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


def fetch(component: str, source: Source, weights: bool = True) -> Path:
    """Return the local folder of a component, downloading it from the hub first where it is not local.

    With `weights=False` only its configuration is fetched, so that a wrong model is refused before gigabytes move.

    Raises:
        UserError: there is no such folder or repository, or it holds no such component, or no whole safetensors
            weights.
    """
    root = Path(source.name_or_path).expanduser()
    patterns = _weight_patterns(source.variant) if weights and component in WITH_WEIGHTS else []
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
    if patterns:
        _check_whole(component, component_files(component, folder, source.variant))
    return folder


def _check_whole(component: str, files: list[Path]) -> None:
    """Check by their headers and sizes that no file of weights is cut off, and that none of several is missing.

    Raises:
        UserError: one is.
    """
    remedy = f"Fetch it again, or give another folder by {COMPONENT_FLAGS[component]}."
    files = [file for file in files if file.suffix == ".safetensors"]
    shards = [SHARD.search(file.name) for file in files]
    if all(shards):
        count = int(shards[0][2])
        for number in range(1, count + 1):
            file = files[0].with_name(SHARD.sub(f"-{number:05d}-of-{count:05d}", files[0].name))
            if not file.is_file():
                raise UserError(f"{file} is not there, one of {count} files of the {component}. {remedy}")
    for file in files:
        try:
            with safe_open(file, "pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file} is damaged: {first_line(error).rstrip('.')}. {remedy}") from error


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


# --- their files ---


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


def component_files(component: str, folder: Path, variant: str | None = None) -> list[Path]:
    """Return the files of a component that `components.load` reads, sorted by name."""
    patterns = ["config.json", *_weight_patterns(variant)] if component in WITH_WEIGHTS else ["*.json", "*.txt"]
    return sorted(file for file in folder.iterdir() if any(fnmatch.fnmatch(file.name, p) for p in patterns))

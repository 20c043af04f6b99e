"""Where an adapter is: a path, a hub repository, or a file or folder in one; and whether a path is one's."""

import glob
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from rasengan import UserError, tensor_files
from rasengan.adapters import ADAPTABLE, DIFFUSERS_FILE, PEFT_CONFIG, PEFT_FILE
from rasengan.downloads import from_hub, not_given
from rasengan.families import is_adapter, is_whole_model


# What a repository's folder is looked through for. No patterns: theirs would reach into every folder below, and fetch
# a whole base model.
KNOWN_FILES = (
    DIFFUSERS_FILE,
    *(f"{folder}{name}" for folder in ("", *(f"{n}/" for n in ADAPTABLE[1:])) for name in (PEFT_CONFIG, PEFT_FILE)),
)


def fetch_adapter(place: str, cache_dir: str | None = None) -> Path:
    """Return the local file or folder of an adapter, downloading it from the hub first where it is not local.

    Args:
        place: a path; or `organization/name`, a repository that holds `pytorch_lora_weights.safetensors`, a PEFT
            folder or a single .safetensors file at its top; or `organization/name/folder-or-file`. Nothing else of a
            repository is fetched.
        cache_dir: where downloads go.

    Raises:
        UserError: there is neither such a path nor such a repository, or it holds no adapter, or several.
    """
    path = Path(place).expanduser()
    parts = place.split("/")
    if path.exists() or len(parts) < 2 or not _is_repository("/".join(parts[:2])):
        return path  # one that is not there is refused by who reads it, in the words for files
    repository, inside = "/".join(parts[:2]), "/".join(parts[2:])
    if not inside.endswith(".safetensors"):
        prefix = f"{inside.strip('/')}/" if inside else ""
        known = [prefix + name for name in KNOWN_FILES]
        folder = _download(repository, known, cache_dir) / inside
        if any((folder / name).is_file() for name in KNOWN_FILES):
            return folder
        inside = _only_file(repository, prefix, folder)
    file = _download(repository, [inside], cache_dir) / inside
    if not file.is_file():
        raise UserError(f"{repository} on the hub has no {inside}. Correct the name behind the repository's.")
    return file


def holds_adapter(path: Path) -> bool:
    """Say whether a local folder or .safetensors file holds an adapter."""
    if path.suffix == ".safetensors" and path.is_file():
        try:
            with tensor_files.opened(path) as content:
                names = list(content.keys())
            # A whole model may have a stray tensor of an adapter's, which is left out.
            return is_adapter(names) and not is_whole_model(name for name in names if not is_adapter([name]))
        except UserError:  # a damaged one is refused by who reads it
            return False
    return any((path / name).is_file() for name in KNOWN_FILES)


def holds_model(path: Path) -> bool:
    """Say whether a local folder holds a whole model."""
    return (path / "model_index.json").is_file() or (path / "unet" / "config.json").is_file()


def _is_repository(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _download(repository: str, files: list[str], cache_dir: str | None) -> Path:
    # Patterns are what it takes; a name may have brackets in it.
    return from_hub(repository, "adapter", [glob.escape(file) for file in files], cache_dir)


def _only_file(repository: str, prefix: str, folder: Path) -> str:
    """Return the name of the only .safetensors file of a repository's folder, which is downloaded to `folder`."""
    try:
        names = HfApi().list_repo_files(repository)
    except Exception as error:  # without a network, classes of the hub's client library, which has changed before
        names = [prefix + file.name for file in folder.glob("*.safetensors")]
        if not names:
            raise not_given(repository, "adapter", error) from error
    found = [name for name in names if name.endswith(".safetensors") and name.rpartition("/")[0] == prefix[:-1]]
    if len(found) != 1:
        raise UserError(
            f"{repository}{'/' + prefix[:-1] if prefix else ''} on the hub holds no {DIFFUSERS_FILE} and no "
            f"{PEFT_CONFIG}, and {len(found) or 'no'} other .safetensors files{': ' if found else ''}"
            f"{', '.join(found[:5])}. Give the file as {repository}/NAME.safetensors."
        )
    return found[0]

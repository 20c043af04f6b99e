"""Write each component of an SDXL base into its own folder, once: no later run downloads it again.

    python scripts/save_components.py stabilityai/stable-diffusion-xl-base-1.0 DIR --variant fp16

One component is in memory at a time. The UNet and the text encoders are written in fp16, the VAE in fp32. After an
interruption, run it again: it continues where it stopped. If everything is there, it verifies every file by its hash.
The other scripts then take DIR as --pretrained_model_name_or_path.
"""

import argparse
import hashlib
import json
import shutil
import sys
from pathlib import Path

import torch
from tqdm.auto import tqdm

from rasengan import UserError, component_checks, components, memory
from rasengan.command_line import Parser, path_type
from rasengan.endings import in_one_line
from rasengan.files import (
    check_writable,
    give_default_mode,
    read_json_or_empty,
    sync,
    write_atomically,
    writing,
)
from rasengan.sources import COMPONENTS, component_sources, fetch


MANIFEST = "components.json"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = Parser(__doc__)
    parser.add_argument("base", metavar="BASE", type=path_type, help="hub id or folder of an SDXL base")
    parser.add_argument("directory", metavar="DIR", type=path_type, help="where to write, such as a mounted Drive")
    parser.add_argument("--revision", help="git revision on the hub")
    parser.add_argument("--variant", help="of the weight files to read; fp16 halves the download")
    parser.add_argument("--cache_dir", type=path_type, help="where downloads go")
    parser.add_argument("--dtype", choices=["fp16", "fp32"], default="fp16", help="of all but the VAE [%(default)s]")
    return parser.parse_args(argv)


def hash_files(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file of a component's folder, by name; empty for a folder that is not there."""
    hashes = {}
    for file in sorted(path for path in folder.glob("*") if path.is_file() and not path.name.startswith(".")):
        with open(file, "rb") as content:
            hashes[file.name] = hashlib.file_digest(content, "sha256").hexdigest()
    return hashes


def write_component(component: str, source: Path, target: Path, dtype: torch.dtype, variant: str | None) -> dict:
    """Write one component beside its target, under another name, and return its hashes as read back."""
    unfinished = unfinished_name(target)
    shutil.rmtree(unfinished, ignore_errors=True)
    components.load(component, source, dtype, variant).save_pretrained(unfinished)
    for file in unfinished.iterdir():
        give_default_mode(file)
        sync(file)
    return hash_files(unfinished)


def put_in_place(target: Path, written: dict[str, str]) -> None:
    """Give what `write_component` wrote its own name, and read it back once more."""
    shutil.rmtree(target, ignore_errors=True)
    unfinished_name(target).rename(target)
    if hash_files(target) != written:
        raise UserError(f"{target} does not read back as it was written. The disk may be full or damaged; run again.")


def unfinished_name(target: Path) -> Path:
    """Return the name of a component that is not known to be whole."""
    return target.with_name(f".{target.name}.unfinished")


def main(args: argparse.Namespace) -> None:
    """Write what is not there yet, and verify what is."""
    directory = Path(args.directory)
    manifest_file = directory / MANIFEST
    base = str(Path(args.base).resolve()) if Path(args.base).is_dir() else args.base
    settings = {"base": base, "revision": args.revision, "variant": args.variant, "dtype": args.dtype}
    manifest = {"settings": settings, "components": {}}
    if manifest_file.is_file():
        manifest = read_json_or_empty(manifest_file)
        if not all(isinstance(manifest.get(part), dict) for part in ("settings", "components")):
            raise UserError(
                f"{manifest_file} is damaged, so it is not known what {directory} holds. Remove {directory} and run "
                "again, or give another folder."
            )
        if manifest["settings"] != settings:
            raise UserError(
                f"{directory} holds components of {manifest['settings']}, not of {settings}. Give another folder."
            )
    strangers = [n for n in COMPONENTS if not manifest["components"].get(n) and (directory / n).exists()]
    if strangers:
        raise UserError(
            f"{directory} has {', '.join(strangers)} from elsewhere, which would be overwritten. Give another "
            "folder, or remove them."
        )
    sources = component_sources(args.base, {}, args.revision, args.variant, args.cache_dir)
    folders = component_checks.fetch_checked(sources)
    check_writable(directory, "DIR")
    dtype = torch.float16 if args.dtype == "fp16" else torch.float32
    with tqdm(COMPONENTS, dynamic_ncols=True) as bar:
        for name in bar:
            bar.set_description(name)
            known = manifest["components"].get(name)
            if known is not None and hash_files(directory / name) == known:
                continue
            remedy = "Make room (7 GB in fp16), or give another folder; what is finished stays."
            with writing(directory / name, remedy):
                # What a run that was cut off has written wholly lacks only its name.
                if known is None or hash_files(unfinished_name(directory / name)) != known:
                    folder = fetch(name, sources[name])
                    known = write_component(name, folder, directory / name, dtype, args.variant)
                    # The manifest comes before the name: whatever has the name is known, and checked by a later run.
                    manifest["components"][name] = known
                    write_atomically(manifest_file, json.dumps(manifest, indent=2).encode())
                put_in_place(directory / name, known)
            memory.give_back()
    if not components.forces_zeros(folders):  # which SDXL 1.0 does, and a base without an index
        index = {"force_zeros_for_empty_prompt": False}
        write_atomically(directory / "model_index.json", json.dumps(index, indent=2).encode())
    print(f"{len(COMPONENTS)} components are in {directory}, each file verified by its hash")


if __name__ == "__main__":
    sys.exit(in_one_line(lambda: main(parse_args()), "the directory"))

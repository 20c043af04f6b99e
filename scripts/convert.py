r"""Write an adapter or a whole SDXL in another layout or dtype, or extract an adapter from a tuned model.

    python scripts/convert.py --input naruto-lora --output naruto.safetensors --format kohya --dtype fp16

    python scripts/convert.py --extract_from naruto-sdxl --base stabilityai/stable-diffusion-xl-base-1.0 --rank 32 \
        --output naruto.safetensors --format kohya

    python scripts/convert.py --input naruto-sdxl --output naruto-sdxl.safetensors --format single_file

    python scripts/convert.py --input someone.safetensors --base stabilityai/stable-diffusion-xl-base-1.0 \
        --output someone-sdxl --format pipeline

What is written is read back and compared bit for bit; an adapter's alpha goes with it. ComfyUI and AUTOMATIC1111 read
kohya's layout of an adapter, and a whole model as a single file.
"""

import argparse
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from tqdm.auto import tqdm

from rasengan import UserError, component_checks, low_rank, whole_model
from rasengan.adapter_places import fetch_adapter, holds_adapter, holds_model
from rasengan.adapter_reader import read_adapter
from rasengan.adapters import ADAPTABLE, Adapter, by_module, default_alpha
from rasengan.command_line import Parser, number_type, path_type
from rasengan.conversion import LAYOUTS, check_family, write_adapter
from rasengan.endings import in_one_line
from rasengan.files import check_name, check_writable
from rasengan.sources import COMPONENTS, component_sources, fetch
from rasengan.tensor_files import PICKLES


DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
MODEL_LAYOUTS = ("pipeline", "single_file")
DORA = "lora_magnitude_vector"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = Parser(__doc__)
    add = parser.add_argument_group("what is read").add_argument
    add(
        "--input",
        type=path_type,
        metavar="PLACE",
        help="an adapter of any layout, or a whole SDXL: file, folder or hub id",
    )
    add("--lora_alpha", type=number_type(1e-8, float), help="of the training, where the file does not say it")
    add("--allow_pickle", action="store_true", help="read an adapter that is a .bin or .pt, tensors alone")
    add("--extract_from", type=path_type, metavar="TUNED", help="instead: hub id, folder or file of a tuned SDXL")
    add("--base", type=path_type, help="the SDXL that TUNED comes from; or of whose kind a single --input is")
    add("--rank", type=number_type(1), help="of the extracted LoRA")
    add("--variant", help="of the weight files of TUNED and BASE, or of a whole --input")
    add("--cache_dir", type=path_type, help="where downloads go")

    add = parser.add_argument_group("what is written").add_argument
    add(
        "--output",
        type=path_type,
        required=True,
        metavar="PLACE",
        help="a .safetensors file; of peft and pipeline a folder",
    )
    kinds = f"of an adapter {', '.join(LAYOUTS)}; of a whole model {', '.join(MODEL_LAYOUTS)}"
    add("--format", choices=(*LAYOUTS, *MODEL_LAYOUTS), required=True, metavar="LAYOUT", help=kinds)
    add("--dtype", choices=DTYPES, help="of the weights [fp32; a whole model keeps its own, its VAE is fp32]")
    add("--resize_rank", type=number_type(1), metavar="N", help="give the nearest LoRA of this rank")
    return parser.parse_args(argv)


def validate_args(args: argparse.Namespace) -> None:
    """Check what the arguments say by themselves."""
    check_places(args)
    if args.format in MODEL_LAYOUTS:
        validate_model(args)
    else:
        validate_adapter(args)
    output, is_folder = Path(args.output), args.format in {"peft", "pipeline"}
    if (output.suffix == ".safetensors") == is_folder:
        kind = "a folder, without .safetensors" if is_folder else "a file that ends in .safetensors"
        raise UserError(f"--output is {args.output}, but --format {args.format} is {kind}. Correct one of them.")
    check_name(output, "--output")
    if os.path.lexists(output):
        raise UserError(f"--output {args.output} exists. Give a name that does not.")
    check_writable(output.resolve().parent, "--output: the folder")


def check_places(args: argparse.Namespace) -> None:
    """Check that no adapter is given in the place of a whole model, and no whole model in that of an adapter."""
    remedies = {
        "extract_from": "Give the tuned model; --input is what reads an adapter.",
        "base": "Give the SDXL that the other place comes from.",
    }
    if args.format in MODEL_LAYOUTS:
        remedies["input"] = (
            f"Give --format {', '.join(LAYOUTS[:-1])} or {LAYOUTS[-1]}; `infer.py --save_merged` is what merges it "
            "into a base."
        )
    elif args.input and holds_model(Path(args.input)) and not holds_adapter(Path(args.input)):
        raise UserError(
            f"--input {args.input} is a whole model, and no adapter. Give it by --extract_from, with --base and "
            f"--rank, or --format {' or '.join(MODEL_LAYOUTS)}."
        )
    for flag, remedy in remedies.items():
        place = getattr(args, flag)
        if place and holds_adapter(Path(place)) and not holds_model(Path(place)):
            raise UserError(f"--{flag} {place} is an adapter, and no whole SDXL. {remedy}")


def validate_model(args: argparse.Namespace) -> None:
    """Check the arguments that say which whole model is read."""
    if args.input is None:
        raise UserError(f"--format {args.format} writes a whole SDXL: give it by --input.")
    if args.extract_from or args.rank or args.resize_rank or args.lora_alpha or args.allow_pickle:
        raise UserError(
            f"--format {args.format} writes a whole SDXL: --extract_from, --rank, --resize_rank, --lora_alpha and "
            "--allow_pickle belong to adapters. Drop them."
        )
    if Path(args.input).suffix in {".safetensors", *PICKLES} and not Path(args.input).exists():
        raise UserError(f"There is no file at {args.input}. Correct --input.")
    if Path(args.input).suffix in PICKLES:
        raise UserError(f"--input {args.input} is a pickle, which is not read. Give the model as safetensors.")
    if Path(args.input).is_file() != bool(args.base):
        raise UserError(
            "--base is for a whole SDXL that is a single file, which does not hold its configuration and tokenizers: "
            "give a folder or a hub id with such an --input, and none with another."
        )
    if args.base and Path(args.base).is_file():
        raise UserError(f"--base {args.base} is a file, which holds no configuration. Give a folder or a hub id.")


def validate_adapter(args: argparse.Namespace) -> None:
    """Check the arguments that say which adapter is read or extracted."""
    if (args.input is None) == (args.extract_from is None):
        raise UserError("Give either --input, or --extract_from with --base and --rank.")
    of_extraction = {"--base": args.base, "--rank": args.rank}
    if args.extract_from and None in of_extraction.values():
        raise UserError("--extract_from needs --base and --rank.")
    if args.input and any(value is not None for value in (*of_extraction.values(), args.variant)):
        raise UserError(
            "--base, --rank and --variant belong to --extract_from. Drop them; --resize_rank is for --input."
        )
    if args.extract_from and all(Path(place).is_file() for place in (args.extract_from, args.base)):
        raise UserError(
            "--extract_from and --base are both single files, which do not hold their configuration. Give one of them "
            "as a folder or a hub id."
        )
    if args.extract_from and (args.resize_rank or args.lora_alpha or args.allow_pickle):
        raise UserError("--resize_rank, --lora_alpha and --allow_pickle belong to --input. Drop them.")


def find_model(args: argparse.Namespace, flag: str, names: Iterable[str], weights: bool = True) -> dict[str, Path]:
    """Return the folder of each component of the model that a flag names.

    With `weights=False` only their configurations are fetched.
    """
    sources = component_sources(getattr(args, flag), {}, None, args.variant, args.cache_dir)
    try:
        found = component_checks.fetch_checked({name: sources[name] for name in names})
        return {name: fetch(name, sources[name]) for name in names} if weights else found
    except UserError as error:
        raise with_flag(error, flag) from error


def with_flag(error: UserError, flag: str) -> UserError:
    """Return an error whose remedies, which are the flags of other scripts, name this one's."""
    text = re.sub(r"the folder .* by --pretrained_\w+, or a base by ", "a whole SDXL by ", str(error))
    return UserError(re.sub(r"--pretrained_\w+( or --pretrained_\w+)?", f"--{flag}", text))


def extract(args: argparse.Namespace) -> tuple[Adapter, dict[str, low_rank.Kept]]:
    """Return the LoRA between the two models, each in folders or the file that holds it all."""
    places = [
        dict.fromkeys(ADAPTABLE, Path(place)) if Path(place).is_file() else find_model(args, flag, ADAPTABLE)
        for flag, place in (("extract_from", args.extract_from), ("base", args.base))
    ]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tqdm(desc="Comparing", unit=" tensors", dynamic_ncols=True) as bar:
        return low_rank.extract_lora(*places, args.rank, args.variant, device, bar.update)


def convert_model(args: argparse.Namespace) -> None:
    """Write a whole model in another layout."""
    dtype = DTYPES[args.dtype] if args.dtype else None
    if args.base:
        folders = find_model(args, "base", COMPONENTS, weights=False)
        opened = whole_model.open_file(Path(args.input), folders, dtype)
        print(f"prediction type: {opened.component('scheduler').config.prediction_type}")
        if opened.left_out:
            print(f"{len(opened.left_out)} tensors that this SDXL has not are left out, such as {opened.left_out[0]}")
    else:
        folders = find_model(args, "input", COMPONENTS)
        opened = whole_model.open_folders(folders, args.variant, dtype)
    output = Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        whole_model.save(output, folders, opened, "--output")
    except UserError as error:
        raise with_flag(error, "base" if args.base else "input") from error


def convert_adapter(args: argparse.Namespace) -> None:
    """Read or extract an adapter, resize it, write it, and say what it is."""
    if args.extract_from:
        adapter, kept = extract(args)
    else:
        adapter = read_adapter(fetch_adapter(args.input, cache_dir=args.cache_dir), args.lora_alpha, args.allow_pickle)
        check_family(adapter, args.input)
        adapter, kept = low_rank.resize_rank(adapter, args.resize_rank) if args.resize_rank else (adapter, {})
    for name, (share, left_out) in kept.items():
        print(f"{name}: {share:.2%} of the norm of its linear layers' changes kept")
        if left_out:
            print(f"warning: {left_out} tensors of the {name} differ outside of its linear layers, and are left out")
    output = Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_adapter(output, adapter, args.format, DTYPES[args.dtype or "fp32"])
    products = [parts for weights in adapter.weights.values() for parts in by_module(weights).values()]
    # Every kind is a product, of which one factor begins as zeros; but DoRA's vector acts by itself.
    if all(any(not tensor.any() for tensor in parts.values()) and DORA not in parts for parts in products):
        print("warning: this adapter changes nothing: it was saved before it was trained")
    for name, config in adapter.configs.items():
        modules = len(by_module(adapter.weights[name]))
        print(f"{name}: {modules} modules, alpha {default_alpha(config):g} / rank {config.r}")


def main(args: argparse.Namespace) -> None:
    """Convert what was given, and say what is there now."""
    validate_args(args)
    if args.format in MODEL_LAYOUTS:
        convert_model(args)
    else:
        convert_adapter(args)
    print(f"Saved and verified {args.output}")


if __name__ == "__main__":
    sys.exit(in_one_line(lambda: main(parse_args()), "--output"))

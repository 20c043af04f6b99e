r"""Write an adapter in another layout, dtype or rank, or extract one from a tuned model; alpha goes with it.

    python scripts/convert.py --input naruto-lora --output naruto.safetensors --format kohya --dtype fp16

    python scripts/convert.py --extract_from naruto-sdxl --base stabilityai/stable-diffusion-xl-base-1.0 --rank 32 \
        --output naruto.safetensors --format kohya

What is written is read back and compared bit for bit. ComfyUI and AUTOMATIC1111 read kohya's layout.
"""

import argparse
import os
import re
import sys
from pathlib import Path

import torch
from tqdm.auto import tqdm

from rasengan import UserError, components, low_rank
from rasengan.adapter_places import fetch_adapter
from rasengan.adapter_reader import read_adapter
from rasengan.adapters import ADAPTABLE, Adapter, by_module, default_alpha
from rasengan.command_line import Parser, number_type, path_type
from rasengan.conversion import LAYOUTS, check_family, write_adapter
from rasengan.endings import in_one_line
from rasengan.files import check_name, check_writable


DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = Parser(__doc__)
    add = parser.add_argument_group("what is read").add_argument
    add("--input", type=path_type, metavar="PLACE", help="an adapter of any layout: file, folder or hub id")
    add("--lora_alpha", type=number_type(1e-8, float), help="of the training, where the file does not say it")
    add("--allow_pickle", action="store_true", help="read an adapter that is a .bin or .pt, tensors alone")
    add("--extract_from", type=path_type, metavar="TUNED", help="instead: hub id, folder or file of a tuned SDXL")
    add("--base", type=path_type, help="hub id, folder or file of the SDXL that it was tuned from")
    add("--rank", type=number_type(1), help="of the extracted LoRA")
    add("--variant", help="of the weight files of TUNED and BASE")
    add("--cache_dir", type=path_type, help="where downloads go")

    add = parser.add_argument_group("what is written").add_argument
    add("--output", type=path_type, required=True, metavar="PLACE", help="a .safetensors file; of PEFT a folder")
    add("--format", choices=LAYOUTS, required=True, help="kohya is what ComfyUI and AUTOMATIC1111 read")
    add("--dtype", choices=DTYPES, default="fp32", help="of the weights [%(default)s]")
    add("--resize_rank", type=number_type(1), metavar="N", help="give the nearest LoRA of this rank")
    return parser.parse_args(argv)


def validate_args(args: argparse.Namespace) -> None:
    """Check what the arguments say by themselves."""
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
    output = Path(args.output)
    if (output.suffix == ".safetensors") == (args.format == "peft"):
        kind = "a folder, without .safetensors" if args.format == "peft" else "a file that ends in .safetensors"
        raise UserError(f"--output is {args.output}, but --format {args.format} is {kind}. Correct one of them.")
    check_name(output, "--output")
    if os.path.lexists(output):
        raise UserError(f"--output {args.output} exists. Give a name that does not.")
    check_writable(output.resolve().parent, "--output: the folder")


def find_model(flag: str, place: str, variant: str | None, cache_dir: str | None) -> dict[str, Path]:
    """Return the folder of each component that can be adapted, or for each the single file that holds them all."""
    if Path(place).is_file():
        return dict.fromkeys(ADAPTABLE, Path(place))
    sources = components.component_sources(place, {}, None, variant, cache_dir)
    try:
        found = {name: components.fetch(name, sources[name], weights=False) for name in ADAPTABLE}
        components.check_components(found)
        return {name: components.fetch(name, sources[name]) for name in ADAPTABLE}
    except UserError as error:  # whose remedies are the flags of other scripts
        raise UserError(re.sub(r"--pretrained_\w+( or --pretrained_\w+)?", f"--{flag}", str(error))) from error


def extract(args: argparse.Namespace) -> tuple[Adapter, dict[str, low_rank.Kept]]:
    """Return the LoRA between the two models."""
    places = [find_model(flag, getattr(args, flag), args.variant, args.cache_dir) for flag in ("extract_from", "base")]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tqdm(desc="Comparing", unit=" tensors", dynamic_ncols=True) as bar:
        return low_rank.extract_lora(*places, args.rank, args.variant, device, bar.update)


def main(args: argparse.Namespace) -> None:
    """Read or extract, resize, write, and say what is there now."""
    validate_args(args)
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
    write_adapter(output, adapter, args.format, DTYPES[args.dtype])
    for name, config in adapter.configs.items():
        modules = len(by_module(adapter.weights[name]))
        print(f"{name}: {modules} modules, alpha {default_alpha(config):g} / rank {config.r}")
    print(f"Saved and verified {output}")


if __name__ == "__main__":
    sys.exit(in_one_line(lambda: main(parse_args()), "--output"))

r"""Draw with a LoRA merged hard into SDXL, and set base and tuned pictures side by side.

    python scripts/infer.py --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 --variant fp16 \
        --lora_weights naruto-lora --compare --height 512 --width 512 --prompt "a wizard in a forest"

The merge is proven: a key that fits nothing, half a pair, a lost alpha or weights that did not change stop it.
"""

import argparse
import json
import re
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import diffusers
import torch
import transformers
from PIL import Image, PngImagePlugin
from tqdm.auto import tqdm

from rasengan import UserError, components, merging, sdxl, single_file, validation
from rasengan.adapter_places import fetch_adapter
from rasengan.adapter_reader import read_adapter
from rasengan.adapters import Adapter, default_alpha
from rasengan.command_line import Parser, number_type, path_type, weighted_place_type
from rasengan.files import check_writable, give_default_mode, lost_place, write_atomically


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = Parser(__doc__)
    add = parser.add_base_flags(components.COMPONENT_FLAGS)
    add("--mixed_precision", choices=["no", "fp16", "bf16"], help="[fp16 on a GPU, no on a CPU]")

    add = parser.add_argument_group("adapter").add_argument
    what = "a .safetensors file, a run's --output_dir, checkpoint-N or PEFT folder, or a hub id (org/name[/file])"
    add("--lora_weights", type=path_type, help=what)
    add(
        "--lora",
        type=weighted_place_type,
        action="append",
        default=[],
        metavar="PLACE[:WEIGHT]",
        help="the same with a weight [1]; given several times, the adapters' changes are summed",
    )
    add("--lora_scale", type=number_type(kind=float), help="on the whole change; 0 is the base [1]")
    add("--lora_alpha", type=number_type(1e-8, float), help="of the training, for a file that does not say")
    add("--allow_pickle", action="store_true", help="read an adapter that is a .bin or .pt, tensors alone")
    add(
        "--save_merged",
        type=path_type,
        metavar="PLACE",
        help="write the tuned model: a pipeline folder, or a file for ComfyUI and A1111 if this ends in .safetensors",
    )

    add = parser.add_argument_group("pictures").add_argument
    add("--prompt", nargs="+", default=[], help="one or several")
    add("--prompt_file", type=path_type, help="one prompt a line")
    add("--negative_prompt", help="what to keep away from")
    add("--compare", action="store_true", help="draw the base too, with the same seeds, and a labelled grid of both")
    add("--output_dir", type=path_type, default="pictures", help="[%(default)s]")
    add(
        "--seed",
        type=number_type(0, most=2**63 - 1),
        default=0,
        help="of a prompt's first picture, then counted up [%(default)s]",
    )
    add("--num_images_per_prompt", type=number_type(1), default=1, help="drawn together [%(default)s]")
    add("--num_inference_steps", type=number_type(1), default=30, help="[%(default)s]")
    add("--guidance_scale", type=number_type(kind=float), default=7.5, help="[%(default)s]")
    add("--height", type=number_type(8), help="in px [the base's, 1024]")
    add("--width", type=number_type(8), help="in px [the base's, 1024]")
    add("--prediction_type", choices=["epsilon", "v_prediction"], help="as in training [the base's]")
    add("--scheduler", choices=sorted(sdxl.SAMPLERS), help="[the base's]")
    return parser.parse_args(argv)


def validate_args(args: argparse.Namespace) -> None:
    """Check what the arguments say by themselves, and read the prompt file."""
    if args.prompt_file:
        try:
            lines = Path(args.prompt_file).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--prompt_file {args.prompt_file} cannot be read: {error}. Give a UTF-8 file.") from error
        args.prompt = args.prompt + [line.strip() for line in lines if line.strip()]
    if not args.prompt and not args.save_merged:
        raise UserError("There is nothing to draw: give --prompt or --prompt_file.")
    for flag in ("height", "width"):
        side = getattr(args, flag)
        if side is not None and side % 8:
            raise UserError(f"--{flag} is {side}. Give a multiple of 8, such as {side // 8 * 8}.")
    if args.compare and not args.prompt:
        raise UserError("--compare needs something to draw: give --prompt or --prompt_file.")
    if args.negative_prompt is not None and args.guidance_scale <= 1:
        raise UserError(
            f"--negative_prompt does nothing at --guidance_scale {args.guidance_scale:g}. Drop one of them."
        )
    if args.lora_weights is not None and args.lora:
        raise UserError("--lora_weights and --lora both name adapters. Give each by a --lora of its own.")
    args.lora = args.lora if args.lora_weights is None else [(args.lora_weights, 1.0)]
    if not args.lora and (args.compare or args.save_merged):
        raise UserError("--compare and --save_merged need an adapter: give --lora_weights.")
    if not args.lora and not (args.lora_alpha is None and args.lora_scale is None):
        raise UserError("--lora_alpha and --lora_scale act on an adapter: give --lora_weights, or drop them.")
    args.lora_scale = 1.0 if args.lora_scale is None else args.lora_scale
    if args.save_merged and Path(args.save_merged).exists():
        raise UserError(f"--save_merged {args.save_merged} exists. Give a name that does not.")
    check_writable(Path(args.output_dir), "--output_dir")
    if args.save_merged:
        check_writable(Path(args.save_merged).resolve().parent, "--save_merged: the folder")


def read_adapters(args: argparse.Namespace) -> list[tuple[Adapter, float]]:
    """Return the adapters, each with the scale on its whole change."""
    adapters = []
    for place, weight in args.lora:
        path = fetch_adapter(place, cache_dir=args.cache_dir)
        adapters.append((read_adapter(path, args.lora_alpha, args.allow_pickle), weight * args.lora_scale))
    return adapters


def merge(adapters: list[tuple[Adapter, float]], component: str, model: torch.nn.Module):
    """Return the component with the adapters merged into it, and say what that changed."""
    configs = [(adapter.configs[component], scale) for adapter, scale in adapters if component in adapter.configs]
    if not configs:
        return model
    model, report = merging.merge(model, adapters, component)
    how = " + ".join(f"alpha {default_alpha(config):g} / rank {config.r} x {scale:g}" for config, scale in configs)
    print(
        f"Merged {report.modules} modules of the {component} at {how}: "
        f"relative weight change {report.relative_change:.3e}"
    )
    return model


@torch.no_grad()
def encode_prompts(args, folders: dict[str, Path], device, dtype, adapters: list[tuple[Adapter, float]]) -> list[dict]:
    """Return each prompt's embeddings for the pipeline, on the CPU; the encoders leave memory again."""
    tokenizers, text_encoders = components.load_text_encoders(folders, args.variant, device, dtype)
    pairs = zip(components.TEXT_ENCODERS, text_encoders, strict=True)
    text_encoders = [merge(adapters, name, model) for name, model in pairs]
    for prompt in args.prompt:
        length = max(sdxl.count_tokens(prompt, tokenizer) for tokenizer in tokenizers)
        if length > tokenizers[0].model_max_length:
            print(f"warning: only the first {tokenizers[0].model_max_length} of {length} tokens are used of: {prompt}")
    encode = partial(encode_prompt, tokenizers=tokenizers, text_encoders=text_encoders)
    negative = None if args.negative_prompt is None else encode(args.negative_prompt)
    return [sdxl.conditioning(encode(prompt), negative, args.num_images_per_prompt) for prompt in args.prompt]


def encode_prompt(prompt: str, tokenizers: list, text_encoders: list) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the embeddings (T, D) and pooled embeddings (P,) of one prompt, on the CPU."""
    return tuple(part[0].cpu() for part in sdxl.encode_prompts([prompt], tokenizers, text_encoders))


def draw_all(args, unet, vae, scheduler, embeds: list[dict], kind: str, bar: tqdm) -> list[list[Image.Image]]:
    """Draw every prompt's pictures, and save each as soon as it is there."""
    seeds = [args.seed + number for number in range(args.num_images_per_prompt)]
    drawn = []
    for number, (prompt, row) in enumerate(zip(args.prompt, embeds, strict=True)):
        row = {name: tensor.to(unet.device) for name, tensor in row.items()}
        size = (args.height, args.width, args.num_inference_steps, args.guidance_scale)
        images = sdxl.draw(unet, vae, scheduler, row, seeds, *size, on_step=bar.update)
        for seed, image in zip(seeds, images, strict=True):
            slug = re.sub(r"\W+", "-", prompt).strip("-")[:40]
            about = PngImagePlugin.PngInfo()
            for name, value in describe(args, prompt, seed, kind).items():
                about.add_itxt(name, str(value))
            validation.save_png(Path(args.output_dir) / f"{number:03d}-{seed}-{slug}-{kind}.png", image, about)
        drawn.append(images)
    return drawn


def describe(args: argparse.Namespace, prompt: str, seed: int, kind: str) -> dict:
    """Return what a picture was made from, for its metadata."""
    shown = ("negative_prompt", "num_inference_steps", "guidance_scale", "height", "width", "scheduler")
    about = {"prompt": prompt, "seed": seed} | {name: getattr(args, name) for name in shown}
    about["model"] = args.pretrained_model_name_or_path or args.pretrained_unet_name_or_path
    shown = [f"{place} at scale {weight * args.lora_scale:g}" for place, weight in args.lora]
    about["adapter"] = " + ".join(shown) if kind == "tuned" else "none"
    return {name: value for name, value in about.items() if value is not None}


def load_scheduler(args, folders: dict[str, Path]):
    """Return the base's scheduler, with the prediction type of the training."""
    scheduler = components.load("scheduler", folders["scheduler"])
    if args.prediction_type:
        scheduler.register_to_config(prediction_type=args.prediction_type)
    return scheduler


def tuned_component(args, name: str, unet, folders: dict[str, Path], dtype: torch.dtype, adapters: list):
    """Return a component of the tuned model, loaded anew but for the UNet."""
    if name == "unet":
        return unet
    if name == "scheduler":
        return load_scheduler(args, folders)
    model = components.load(name, folders[name], dtype, args.variant)
    return merge(adapters, name, model) if name in components.TEXT_ENCODERS else model


def save_merged(args, unet, folders: dict[str, Path], dtype: torch.dtype, adapters: list[tuple[Adapter, float]]):
    """Write the tuned model as a folder or a single file, one component in memory at a time beside the UNet."""
    final = Path(args.save_merged)
    tuned = partial(tuned_component, args, unet=unet, folders=folders, dtype=dtype, adapters=adapters)
    if final.suffix == ".safetensors":
        skeletons = {name: components.skeleton(name, folders[name]) for name in single_file.COMPONENTS}
        dtypes = {name: torch.float32 if name == "vae" else dtype for name in single_file.COMPONENTS}
        prediction_type = load_scheduler(args, folders).config.prediction_type
        single_file.write_single_file(final, skeletons, dtypes, lambda name: tuned(name).state_dict(), prediction_type)
    else:
        save_folder(final, tuned)
    print(f"Saved the tuned model as {final}")


def save_folder(final: Path, tuned: Callable[[str], object]) -> None:
    """Write a complete pipeline folder."""
    unfinished = final.with_name(f".{final.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    index = {"_class_name": "StableDiffusionXLPipeline", "_diffusers_version": diffusers.__version__}
    index["force_zeros_for_empty_prompt"] = True
    for name in components.COMPONENTS:
        model = tuned(name)
        model.save_pretrained(unfinished / name)
        library = "transformers" if name in (*components.TOKENIZERS, *components.TEXT_ENCODERS) else "diffusers"
        index[name] = [library, type(model).__name__]
    write_atomically(unfinished / "model_index.json", json.dumps(index, indent=2).encode())
    for file in unfinished.rglob("*.safetensors"):
        give_default_mode(file)
    unfinished.rename(final)


def main(args: argparse.Namespace) -> None:
    """Draw, and leave the pictures in --output_dir."""
    validate_args(args)
    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = args.mixed_precision or ("fp16" if device.type == "cuda" else "no")
    dtype = components.weight_dtype(precision, device)

    # Everything that can be wrong, before anything is loaded.
    overrides = components.component_overrides(vars(args))
    sources = components.component_sources(
        args.pretrained_model_name_or_path, overrides, args.revision, args.variant, args.cache_dir
    )
    folders = {name: components.fetch(name, source, weights=False) for name, source in sources.items()}
    components.check_components(folders)
    adapters = read_adapters(args)
    for adapter, _ in adapters:
        for name, weights in adapter.weights.items():
            merging.check_adapter(weights, adapter.configs[name], components.skeleton(name, folders[name]), name)
    folders = {name: components.fetch(name, source) for name, source in sources.items()}
    train_timesteps = load_scheduler(args, folders).config.num_train_timesteps
    if args.num_inference_steps > train_timesteps:
        raise UserError(
            f"--num_inference_steps is {args.num_inference_steps}, but the scheduler has {train_timesteps} timesteps. "
            "Give fewer; 30 is usual."
        )
    default_side = 8 * (components.read_config("unet", folders["unet"]).get("sample_size") or 128)
    args.height, args.width = args.height or default_side, args.width or default_side

    adapts_text = any(name in adapter.weights for adapter, _ in adapters for name in components.TEXT_ENCODERS)
    embeds = encode_prompts(args, folders, device, dtype, adapters) if args.prompt else []
    base_embeds = encode_prompts(args, folders, device, dtype, []) if args.compare and adapts_text else embeds
    components.free_memory()

    scheduler = sdxl.make_sampler(load_scheduler(args, folders), args.scheduler)
    vae = components.load("vae", folders["vae"], variant=args.variant).to(device)
    unet = components.load("unet", folders["unet"], dtype, args.variant).to(device)
    steps = args.num_inference_steps * len(args.prompt) * (2 if args.compare else 1)
    with tqdm(total=steps, desc="Drawing", dynamic_ncols=True) as bar:
        if args.compare:
            base = draw_all(args, unet, vae, scheduler, base_embeds, "base", bar)
        unet = merge(adapters, "unet", unet)
        drawn = draw_all(args, unet, vae, scheduler, embeds, "tuned" if adapters else "base", bar)
    if args.compare:
        rows = [list(pair) for both in zip(base, drawn, strict=True) for pair in zip(*both, strict=True)]
        labels = [f"{prompt} ({args.seed + n})" for prompt in args.prompt for n in range(args.num_images_per_prompt)]
        columns = ["base", f"LoRA x {args.lora_scale:g}"]
        validation.save_png(Path(args.output_dir) / "grid.png", validation.image_grid(rows, labels, columns))
    if args.prompt:
        print(f"{sum(map(len, drawn)) * (2 if args.compare else 1)} pictures are in {args.output_dir}")
    if args.save_merged:
        save_merged(args, unet, folders, dtype, adapters)


if __name__ == "__main__":
    try:
        main(parse_args())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        text = lost_place(error, "--output_dir or --save_merged")
        if text is None:
            raise
        print(f"error: {text}", file=sys.stderr)
        sys.exit(2)

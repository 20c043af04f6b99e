r"""Draw with a LoRA that is merged into SDXL, and show base and tuned pictures side by side.

    python scripts/infer.py --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 --variant fp16 \
        --lora_weights naruto-lora --compare --height 512 --width 512 --prompt "a wizard in a forest"

The merge is checked: a key that fits nothing, half a pair, a lost alpha or weights that did not change are errors.
`accelerate launch` in place of `python` divides the prompts among several GPUs.
"""

import argparse
import gc
import itertools
import os
import sys
from functools import partial
from pathlib import Path


# Before PyTorch looks: it then grows its memory in place, and loses less between blocks of different sizes.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
# What is imported stays, and to look through it for garbage again and again takes a quarter of the imports' time.
gc.disable()

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from rasengan import (
    UserError,
    component_checks,
    components,
    drawing,
    fitting,
    memory,
    merging,
    processes,
    prompts,
    sdxl,
    sweep,
    tensor_files,
    whole_model,
)
from rasengan.adapters import ADAPTABLE
from rasengan.command_line import (
    Parser,
    conditioning_cache_dir,
    number_type,
    numbers_type,
    path_type,
    weighted_place_type,
)
from rasengan.compared_models import Model, describe_merge, read_models
from rasengan.endings import in_one_line
from rasengan.files import check_name, check_writable
from rasengan.pipeline import Pipeline
from rasengan.sources import COMPONENT_FLAGS, TEXT_ENCODERS, fetch, sources_of


gc.freeze()
gc.enable()


WEIGHT_ENDINGS = {".safetensors", *tensor_files.PICKLES}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = Parser(__doc__)
    positive = number_type(1)
    add = parser.add_base_flags(COMPONENT_FLAGS)
    add("--mixed_precision", choices=["no", "fp16", "bf16"], help="[fp16 on a GPU, no on a CPU]")
    add("--vram_budget_gib", type=number_type(0.1, float), help="GPU memory to use [what the card has]")
    add("--conditioning_cache_dir", type=path_type, help="for the prompts' embeddings [~/.cache/rasengan]")

    add = parser.add_argument_group("adapter").add_argument
    what = "a .safetensors file, a run's --output_dir, checkpoint-N, a PEFT folder, or a hub id (org/name[/file])"
    add("--lora_weights", type=path_type, nargs="+", default=[], help=f"{what}; several are compared")
    what = "the same with a weight [1]; given several times, the adapters' changes are summed"
    kind = {"type": weighted_place_type, "metavar": "PLACE[:WEIGHT]"}
    add("--lora", action="append", default=[], help=what, **kind)
    what = "on the change (of a DoRA on its B A alone); 0 is the base; several, such as 0,0.5,1, are compared [1]"
    add("--lora_scale", type=numbers_type, help=what)
    add("--lora_alpha", type=number_type(1e-8, float), help="of the training, where a file does not say it")
    add("--allow_pickle", action="store_true", help="read an adapter that is a .bin or .pt, tensors alone")
    what = "write the tuned model: a folder, or a file for ComfyUI and A1111 if this ends in .safetensors"
    add("--save_merged", type=path_type, metavar="PLACE", help=what)

    add = parser.add_argument_group("pictures").add_argument
    add("--prompt", nargs="+", action="extend", default=[], help="one or several")
    add("--prompt_file", type=path_type, help="one prompt a line")
    add("--negative_prompt", help="what the pictures should not show")
    add("--compare", action="store_true", help="draw the base too, with the same seeds, and labelled grids of both")
    add("--output_dir", type=path_type, default="pictures", help="[%(default)s]")
    kind = number_type(0, most=2**63 - 1)
    add("--seed", type=kind, default=0, help="of a prompt's first picture, then counted up [%(default)s]")
    add("--num_images_per_prompt", type=positive, default=1, help="drawn together [%(default)s]")
    add("--num_inference_steps", type=positive, default=30, help="[%(default)s]")
    add("--guidance_scale", type=number_type(0, float), default=7.5, help="[%(default)s]")
    add("--height", type=number_type(8), help="in px [the base's, 1024]")
    add("--width", type=number_type(8), help="in px [the base's, 1024; of --init_image if neither is given]")
    add("--init_image", type=path_type, help="a picture to begin with, in place of noise")
    add("--strength", type=number_type(0, float, most=1), help="how much of --init_image is drawn anew [0.6]")
    add("--prediction_type", choices=["epsilon", "v_prediction"], help="as in training [the base's]")
    add("--scheduler", choices=sorted(sdxl.SAMPLERS), help="[the base's]")
    args = parser.parse_args(argv)
    args.conditioning_cache_dir = conditioning_cache_dir(args.conditioning_cache_dir, os.environ)
    return args


def validate_args(args: argparse.Namespace) -> None:
    """Check what the arguments say by themselves, and read the prompt file."""
    if args.prompt_file:
        try:
            lines = Path(args.prompt_file).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--prompt_file {args.prompt_file} cannot be read: {error}. Give a UTF-8 file.") from error
        args.prompt = args.prompt + [line.strip() for line in lines if line.strip()]
        if not args.prompt:
            raise UserError(f"--prompt_file {args.prompt_file} holds no prompt. Write one a line, or give --prompt.")
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
    if args.strength is not None and not args.init_image:
        raise UserError("--strength acts on --init_image, which is not given. Drop it, or give a picture.")
    args.strength = 0.6 if args.strength is None else args.strength
    several = args.compare or len(args.lora_weights) > 1 or len(args.lora_scale or []) > 1
    if several and args.init_image and not args.strength:
        raise UserError("At --strength 0 --init_image itself stands in every column. Give a greater one.")
    if args.init_image and args.strength and not int(args.num_inference_steps * args.strength):
        raise UserError(
            f"--strength {args.strength:g} of --num_inference_steps {args.num_inference_steps} is no step. Raise one."
        )
    if args.lora_weights and args.lora:
        raise UserError("--lora_weights and --lora both name adapters. Give each by a --lora of its own.")
    has_adapter = bool(args.lora or args.lora_weights)
    if args.compare and args.lora_scale == [0.0]:
        raise UserError("--compare at --lora_scale 0 has the base on both sides. Give another scale.")
    if not has_adapter and (args.compare or args.save_merged):
        raise UserError("--compare and --save_merged need an adapter: give --lora_weights.")
    if not has_adapter and not (args.lora_alpha is None and args.lora_scale is None):
        raise UserError("--lora_alpha and --lora_scale act on an adapter: give --lora_weights, or drop them.")
    args.lora_scale = args.lora_scale or [1.0]
    for one, other in itertools.combinations(args.lora_scale, 2):
        if f"{one:g}" == f"{other:g}":
            raise UserError(f"--lora_scale holds {one} and {other}, which are both shown as {one:g}. Drop one.")
    if args.save_merged and (len(args.lora_scale) > 1 or len(args.lora_weights) > 1):
        raise UserError("--save_merged writes one model: give one --lora_scale, and one --lora_weights.")
    if args.lora and not any(weight for _, weight in args.lora):
        raise UserError("Every --lora has the weight 0, which is the base. Give one another weight.")
    if args.save_merged and args.lora_scale == [0.0]:
        raise UserError("--save_merged at --lora_scale 0 would write the base. Give another scale.")
    if args.save_merged:
        check_name(Path(args.save_merged), "--save_merged")
        ending = Path(args.save_merged).suffix
        if ending.lower() in WEIGHT_ENDINGS and ending != ".safetensors":
            raise UserError(
                f"--save_merged is {args.save_merged}, but a file that is written ends in .safetensors. Give this "
                "ending, or none of a file, for a folder."
            )
    if args.save_merged and os.path.lexists(args.save_merged):
        raise UserError(f"--save_merged {args.save_merged} exists. Give a name that does not.")
    check_writable(Path(args.output_dir), "--output_dir")
    check_writable(Path(args.conditioning_cache_dir), "--conditioning_cache_dir")
    if args.save_merged:
        check_writable(Path(args.save_merged).resolve().parent, "--save_merged: the folder")


# --- what is drawn with ---


def report(model: Model, component: str, change: merging.MergeReport) -> None:
    """Say what a merge changed, above a progress bar where there is one."""
    for line in describe_merge(model, component, change):
        tqdm.write(line, file=sys.stdout)


def encode(args, accelerator: Accelerator, folders: dict[str, Path], dtype: torch.dtype, model: Model) -> dict:
    """Return the embeddings of each prompt, and of the negative one, as this model's text encoders give them."""
    texts = list(dict.fromkeys([*args.prompt, *([] if args.negative_prompt is None else [args.negative_prompt])]))
    how = (texts, folders, args.variant, processes.device_of(accelerator), dtype)
    if any(name in adapter.weights for adapter, _ in model.adapters for name in TEXT_ENCODERS):
        encoded, reports = prompts.encode_tuned(*how, model.adapters)
        for name, change in reports.items() if accelerator.is_main_process else ():
            report(model, name, change)
        return encoded
    bar = partial(processes.progress_bar, accelerator, "Encoding prompts")
    share = processes.machine_share(os.environ)
    return prompts.encode_once(*how, Path(args.conditioning_cache_dir), share, bar, args.vram_budget_gib)


# --- pictures ---


def seeds_of(args: argparse.Namespace) -> list[int]:
    """Return the seeds of each prompt's pictures."""
    return [args.seed + number for number in range(args.num_images_per_prompt)]


def settings_of(args: argparse.Namespace) -> dict[str, object]:
    """Return what all pictures were drawn with."""
    shown = ("negative_prompt", "num_inference_steps", "guidance_scale", "height", "width", "scheduler", "init_image")
    shown += ("prediction_type", "mixed_precision", "lora_alpha")
    about = {"model": args.pretrained_model_name_or_path or args.pretrained_unet_name_or_path}
    places = [flag.removeprefix("--") for flag in COMPONENT_FLAGS.values()]
    about |= {name: getattr(args, name) for name in (*shown, *places, "revision", "variant")} | (
        {"strength": args.strength} if args.init_image else {}
    )
    return {name: value for name, value in about.items() if value is not None}


def draw_share(args, accelerator: Accelerator, pipeline: Pipeline, models: list[Model], embeds: list[dict], init):
    """Yield (model's place, prompt's number, latents) for this process's share of the prompts, model by model."""
    scheduler = components.load_scheduler(pipeline.folders["scheduler"], args.prediction_type)
    scheduler = sdxl.make_sampler(scheduler, args.scheduler)
    seeds = seeds_of(args)
    mine = range(accelerator.process_index, len(args.prompt), accelerator.num_processes)
    options = {name: getattr(args, name) for name in ("height", "width", "num_inference_steps", "guidance_scale")}
    options |= {"init": init, "strength": args.strength}
    strength = args.strength if args.init_image else None
    steps = len(drawing.timesteps_of(scheduler, args.num_inference_steps, strength))
    with processes.progress_bar(accelerator, "Drawing", steps * len(models) * len(mine)) as bar:
        for place, (model, rows) in enumerate(zip(models, embeds, strict=True)):
            change = pipeline.use(model.adapters, is_last=model is models[-1])
            if change is not None and accelerator.is_main_process:
                report(model, "unet", change)
            negative = None if args.negative_prompt is None else rows[args.negative_prompt]
            for number in mine:
                row = sdxl.conditioning(rows[args.prompt[number]], negative, len(seeds))
                yield place, number, pipeline.draw(scheduler, row, seeds, on_step=bar.update, **options).cpu()


def main(args: argparse.Namespace) -> None:
    """Draw, and leave the pictures in --output_dir."""
    validate_args(args)
    components.disable_progress_bars()
    precision = args.mixed_precision = args.mixed_precision or processes.default_precision(os.environ)
    accelerator = processes.make_accelerator(os.environ, precision)
    device, budget_gib = processes.device_of(accelerator), float("inf")
    if device.type == "cuda":
        budget_gib = memory.limit(args.vram_budget_gib, device, processes.sharing_a_gpu(os.environ))
    elif args.vram_budget_gib:
        raise UserError("--vram_budget_gib is of a GPU's memory, and this draws on the CPU. Drop the flag.")
    dtype = components.weight_dtype(precision, device)

    # Everything that can be wrong, before anything is loaded.
    sources = sources_of(vars(args))
    folders = component_checks.fetch_checked(sources)
    which = (args.lora_weights, args.lora, args.lora_scale, args.compare)
    models = read_models(*which, args.lora_alpha, args.allow_pickle, args.cache_dir)
    skeletons = {name: components.skeleton(name, folders[name]) for name in ADAPTABLE}
    for adapter in {id(adapter): adapter for model in models for adapter, _ in model.adapters}.values():
        fitting.check_fits(adapter, skeletons)
    default_side = 8 * (components.read_config("unet", folders["unet"]).get("sample_size") or 128)
    begin = drawing.read_picture(args.init_image, args.height, args.width, default_side) if args.init_image else None
    args.height, args.width = begin.shape[2:] if begin is not None else (args.height, args.width)
    args.height, args.width = args.height or default_side, args.width or default_side
    with processes.one_goes_first(accelerator.is_local_main_process):
        folders = {name: fetch(name, source) for name, source in sources.items()}
    if args.guidance_scale > 1:
        args.negative_prompt = components.negative_prompt(args.negative_prompt, folders)
    scheduler = components.load_scheduler(folders["scheduler"], args.prediction_type)
    drawing.check_steps(sdxl.make_sampler(scheduler, args.scheduler), args.num_inference_steps)

    if args.prompt:
        texts = args.prompt + [args.negative_prompt] * (args.negative_prompt is not None)
        for prompt, length, most in prompts.too_long(texts, folders) if accelerator.is_main_process else ():
            print(f"warning: only the first {most} of {length} tokens are used of: {prompt}")
        embeds = [encode(args, accelerator, folders, dtype, model) for model in models]
        pipeline = Pipeline(folders, args.variant, device, dtype)
        init = pipeline.encode(begin) if begin is not None else None
        output_dir, seeds, settings = Path(args.output_dir), seeds_of(args), settings_of(args)
        pictures = sweep.place_pictures(output_dir, models, args.prompt, seeds, settings)
        drawn = draw_share(args, accelerator, pipeline, models, embeds, init)
        sweep.write_pictures(pipeline, pictures, drawn, seeds, args.height, args.width, budget_gib)
        processes.wait_for_everyone()
        if accelerator.is_main_process:
            sweep.show_together(output_dir, models, args.prompt, seeds, pictures, settings)
            beside = ", side by side in grid*.png" * (len(models) > 1)
            there = "1 picture is" if len(pictures) == 1 else f"{len(pictures)} pictures are"
            print(f"{there} in {args.output_dir}, and together in contact_sheet.html{beside}")
            if device.type == "cuda":
                print(f"Peak: {memory.peak_reserved_gib(device):.2f} GiB")
        pipeline.drop_unet()
    if args.save_merged and accelerator.is_main_process:
        (tuned,) = [model for model in models if model.adapters]
        where = Path(args.save_merged), folders, args.variant
        say = partial(report, tuned) if not args.prompt else lambda *_: None  # drawing has said it
        whole_model.save_tuned(*where, dtype, scheduler, tuned.adapters, say)
        print(f"Saved the tuned model as {args.save_merged}")


if __name__ == "__main__":
    places = "--output_dir, --conditioning_cache_dir or --save_merged"
    processes.end(in_one_line(lambda: main(parse_args()), places, int(os.environ.get("RANK", 0))))

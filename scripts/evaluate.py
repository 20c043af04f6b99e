r"""Evaluate an adapter: compare its loss on held-out pictures, and the pictures that it draws, with the base's.

    python scripts/evaluate.py --lora_weights naruto-lora --checkpoints

Base, pictures and settings are read from the output folder of the training, which should have had --validation_split.
For any other adapter give --pretrained_model_name_or_path, the data flags and --validation_split. The report is
printed, and written to --output_dir as evaluation.json, evaluation.html and tensorboard/.
"""

import argparse
import gc
import os
from functools import partial, wraps
from pathlib import Path
from typing import NamedTuple


# Before PyTorch looks: it then grows its memory in place, and loses less between blocks of different sizes.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
# What is imported stays, and to look through it for garbage again and again takes a quarter of the imports' time.
gc.disable()

import datasets
import torch
from PIL import Image

from rasengan import (
    UserError,
    cache,
    checkpoint,
    component_checks,
    components,
    data,
    data_survey,
    drawing,
    evaluated_run,
    evaluation,
    evaluation_page,
    fitting,
    imaging,
    loss_comparison,
    miniature,
    pages,
    processes,
    prompts,
    samples,
    scores,
    sdxl,
    world,
)
from rasengan.adapter_places import fetch_adapter
from rasengan.adapter_reader import read_adapter
from rasengan.adapters import ADAPTABLE, Adapter
from rasengan.captions import read_captions
from rasengan.command_line import (
    Parser,
    conditioning_cache_dir,
    number_type,
    path_type,
    share_or_count_type,
    words_of,
)
from rasengan.endings import in_one_line
from rasengan.evaluation import Drawn
from rasengan.files import check_writable, read_json_or_empty
from rasengan.loss_comparison import KINDS, Losses, Point
from rasengan.pipeline import Pipeline
from rasengan.sources import COMPONENT_FLAGS, fetch, sources_of


gc.freeze()
gc.enable()


SOURCE = ("dataset_name", "dataset_config_name", "train_data_dir")
COMPONENT_PLACES = [flag.removeprefix("--") for flag in COMPONENT_FLAGS.values()]
OWN = {"output_dir", "lora_alpha"}  # which training has too, and means otherwise
MOST_REFERENCES = 500  # pictures of the data that KID and CMMD take


class Measured(NamedTuple):
    """Captioned pictures, and which of them are measured on."""

    column: datasets.Column
    pictures: list[imaging.Picture]
    captions: list[list[str]]
    rows: evaluated_run.Rows


# --- the command line ---


def make_parser() -> Parser:
    """Return the parser, with the flags of training and drawing."""
    parser = Parser(__doc__, "Defaults stand in brackets; the run's own settings take precedence over them.")
    add, positive = parser.add_argument_group("adapter").add_argument, number_type(1)
    what = "a run's --output_dir, its checkpoint-N or best, a .safetensors file, a PEFT folder, or a hub id"
    add("--lora_weights", type=path_type, required=True, help=what)
    add("--lora_scale", type=number_type(kind=float), default=1.0, help="strength of the adapter [%(default)s]")
    add("--lora_alpha", type=number_type(1e-8, float), help="of the training, where a file does not say it")

    add = parser.add_base_flags(COMPONENT_FLAGS)
    add("--mixed_precision", choices=["no", "fp16", "bf16"], help="[fp16 on a GPU, no on a CPU]")
    add("--prediction_type", choices=["epsilon", "v_prediction"], help="[the scheduler's]")
    add("--conditioning_cache_dir", type=path_type, help="shared with training [~/.cache/rasengan]")
    add("--encode_batch_size", type=positive, help="pictures encoded together [2 at 512 px, 1 at 1024]")

    add = parser.add_data_flags(imaging.INTERPOLATIONS)
    add("--seed", type=number_type(0, most=2**32 - 1), default=0, help="of training [%(default)s]")

    add = parser.add_argument_group("loss", "of held-out pictures, and of as many that were trained on").add_argument
    add("--validation_split", type=share_or_count_type, help="that of training: a share, such as 0.05, or a number")
    add("--checkpoints", action="store_true", help="measure the run's checkpoints and best/ too")

    add = parser.add_argument_group("pictures", "of both models, with the same noise").add_argument
    add(
        "--num_pictures", type=number_type(0), help="for each seed; 0 for none [8, or each --prompt; with --judge 200]"
    )
    add("--picture_seeds", type=number_type(0, most=2**31), nargs="+", default=[0], help="one or several [0]")
    add("--prompt", nargs="+", action="extend", default=[], help="one or several [captions of held-out pictures]")
    add("--num_inference_steps", type=positive, default=30, help="[%(default)s]")
    add("--guidance_scale", type=number_type(0, float), default=7.5, help="[%(default)s]")
    add("--scheduler", choices=sorted(sdxl.SAMPLERS), help="[the base's]")

    add = parser.add_argument_group("scores", "of the pictures").add_argument
    what = "score style and content of scenes by the judge in this folder, which train_miniature.py wrote"
    add("--judge", type=path_type, help=what)
    add("--clip_model", type=path_type, help="folder or hub id of a CLIP model, for CLIP score, KID, CMMD")
    add("--output_dir", type=path_type, help="[evaluation, in the run's folder where there is one]")
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the arguments of the command line, with the run's own settings in place of the defaults."""
    parser = make_parser()
    given = parser.parse_args(argv)
    run = evaluated_run.find_run(given.lora_weights)
    file = run / "args.json" if run else None
    settings = read_json_or_empty(file) if run else {}
    known = {action.dest for action in parser._actions} - OWN
    if any(getattr(given, name) for name in SOURCE):
        known -= {*SOURCE, "max_train_samples"}  # other pictures than the run's
    if settings.get("mixed_precision") == "fp16" and not torch.cuda.is_available():
        known.discard("mixed_precision")  # it was trained on another machine
    # Likewise, or they name what is none: a stranger's settings choose no folder to write in.
    if not cache.is_one(settings.get("conditioning_cache_dir")):
        known.discard("conditioning_cache_dir")
    if not data.is_library_cache(settings.get("cache_dir")):
        known.discard("cache_dir")
    words = words_of({name: settings[name] for name in known & settings.keys()}, parser, str(file))
    try:
        of_run = parser.parse_args([*words, f"--lora_weights={given.lora_weights}"])
    except UserError as error:
        raise UserError(f"{file} is not as a training writes it: {error}") from error
    parser.set_defaults(**{name: getattr(of_run, name) for name in known & settings.keys()})
    args = parser.parse_args(argv)
    args.run, args.run_settings = run, settings | {name: getattr(of_run, name) for name in known & settings.keys()}
    args.output_dir = args.output_dir or str((run or Path()) / "evaluation")
    if args.num_pictures is None:
        args.num_pictures = 200 if args.judge else len(args.prompt) or 8
    args.conditioning_cache_dir = conditioning_cache_dir(args.conditioning_cache_dir, os.environ)
    return args


def validate_args(args: argparse.Namespace) -> None:
    """Check what the arguments and the run's settings say by themselves."""
    if processes.machine_share(os.environ)[1] > 1:
        raise UserError("evaluate.py is one process. Start it by `python` in place of `accelerate launch`.")
    if not (args.run_settings or args.dataset_name or args.train_data_dir):
        raise UserError(
            f"--lora_weights {args.lora_weights} lies in no output folder of a training with an args.json that names "
            "base and pictures. Give one, or --pretrained_model_name_or_path, --train_data_dir and --validation_split."
        )
    data.check_settings(args.dataset_name, args.train_data_dir, args.resolution, args.bucket_step_px)
    data.check_outside(vars(args))
    if args.validation_split is None:
        no_split = f"The run in {args.run} held out no pictures" if args.run else "No pictures are held out"
        raise UserError(
            f"{no_split}. Train with --validation_split, or give it here to measure on some that were trained on."
        )
    if args.lora_scale == 0:
        raise UserError("--lora_scale is 0, which is the base. Give another scale.")
    if args.checkpoints and not (args.run and checkpoint.list_checkpoints(args.run)):
        where = args.run or f"{args.lora_weights}, which is of no run"
        raise UserError(f"--checkpoints: there is no checkpoint-N in {where}. Drop the flag, or name a run's folder.")
    if args.judge and args.prompt:
        raise UserError("--judge knows scenes of its own, and no --prompt. Drop one of them.")
    if args.judge and args.num_pictures > world.MOST_HELD_OUT:
        raise UserError(
            f"--num_pictures is {args.num_pictures}, but --judge has {world.MOST_HELD_OUT:,} scenes. Give fewer."
        )
    if not args.num_pictures and (args.judge or args.clip_model or args.prompt):
        raise UserError(
            "--num_pictures 0 draws nothing for --prompt, --judge or --clip_model. Give more, or drop these."
        )
    if args.prompt and args.num_pictures < len(args.prompt):
        raise UserError(
            f"--num_pictures is {args.num_pictures}, but there are {len(args.prompt)} of --prompt. Give as many."
        )
    if len(set(args.picture_seeds)) < len(args.picture_seeds):
        raise UserError("--picture_seeds names a seed twice. Give each once.")
    if args.clip_model:
        scores.check_clip(args.clip_model, args.cache_dir)
    check_writable(Path(args.output_dir), "--output_dir")
    check_writable(Path(args.conditioning_cache_dir), "--conditioning_cache_dir")


# --- what is measured on, and with ---


def find_measured(args: argparse.Namespace, make_bar) -> tuple[Measured, list[str]]:
    """Return the pictures as training reads them, and notes on which of them it saw."""
    _, dataset, pictures = data.find_pictures(vars(args), make_bar)
    dataset, pictures = data.leave_out_broken(dataset, pictures, args.skip_bad_images)
    captions = read_captions(dataset, args.caption_column, pictures)
    settings = args.run_settings if args.run else None
    rows, notes = evaluated_run.choose_rows(pictures, captions, args.validation_split, args.seed, settings)
    if args.run_settings.get("base_quantization", "none") != "none":
        notes.append("It was trained on a base in 4 bits, and is measured on the whole one.")
    return Measured(dataset[args.image_column], pictures, captions, rows), notes


def read_fitting(path: Path, lora_alpha: float | None, skeletons: dict) -> Adapter:
    """Return an adapter, once it is shown to fit the base."""
    adapter = read_adapter(path, lora_alpha)
    fitting.check_fits(adapter, skeletons)
    return adapter


def choose_pictures(args: argparse.Namespace, measured: Measured) -> tuple[list[Drawn], list[world.Scene]]:
    """Return what is drawn, and with --judge the scenes that each seed's pictures show."""
    scenes = world.held_out_scenes(args.num_pictures) if args.judge else []
    texts = args.prompt or list(dict.fromkeys(measured.captions[row][0] for row in measured.rows.held_out))
    texts = [scene.caption for scene in scenes] or texts
    return evaluation.to_draw(texts, args.num_pictures, args.picture_seeds), scenes


def encode(args, folders: dict, measured: Measured, prompts: set[str], sizes, device, dtype, make_bar) -> tuple:
    """Return the latents, and the embeddings of what is measured and drawn, from training's cache if it is there."""
    directory, share = Path(args.conditioning_cache_dir), processes.machine_share(os.environ)
    options = {"sizes": sizes, "interpolation": args.image_interpolation_mode, "random_flip": args.random_flip}
    batch_size, bar = args.encode_batch_size or cache.pictures_at_once(args.resolution), partial(make_bar, "Encoding")
    how = (folders["vae"], args.variant, device, share, bar, batch_size)
    latents = cache.cached_latents(directory, measured.column, measured.pictures, *how, **options)
    texts = [text for several in measured.captions for text in several]
    others = prompts.difference(texts)
    groups = texts, sorted(others)
    captions, rest = cache.cached_prompts(directory, groups, folders, args.variant, device, dtype, share, bar)
    needed = {text for row in (*measured.rows.held_out, *measured.rows.trained) for text in measured.captions[row]}
    return latents, {text: (rest if text in others else captions)[text] for text in needed | prompts}


# --- scores ---


def crop(args: argparse.Namespace, measured: Measured, row: int, sizes: list[imaging.Size]) -> Image.Image:
    """Return a picture of the data as training crops it."""
    image = imaging.decode(imaging.read_bytes(measured.column[row]))
    return data_survey.center_crop(image, sizes, args.image_interpolation_mode)


def score(args, judge, scenes: list, device, drawn: list[Drawn], images: dict, references: list[Image.Image]) -> dict:
    """Return what judge and CLIP say of both models' pictures."""
    found = {"count": len(drawn), "drawn": [one._asdict() for one in drawn]}
    if judge:
        found["judge"] = scores.by_judge(judge, images, scenes, args.picture_seeds)
    if args.clip_model:
        clip, texts = scores.load_clip(args.clip_model, device, args.cache_dir), [one.prompt for one in drawn]
        found["clip"] = {"model": args.clip_model} | scores.by_clip(clip, images, texts, references)
    return found


# --- the checkpoints' losses ---


def measure_curve(
    args, bench: evaluation.Bench, both: list, losses: dict[str, Losses], step: int | None, skeletons: dict
) -> tuple[list[Point], list[str]]:
    """Return the losses by step: of the base, of the adapter and of --checkpoints; and notes on what is not.

    Args:
        args: of the command line.
        bench: to measure with; the last checkpoint stays merged in it.
        both: the samples that are held out, and those trained on.
        losses: of base and tuned model.
        step: of the adapter; None where nothing says it.
        skeletons: that an adapter is to fit.
    """
    # The curve is of averages where the run has them, which a checkpoint's own adapter is not.
    has_average = (Path(args.lora_weights) / checkpoint.EMA_FOLDER).is_dir()
    on_curve = None if has_average else step
    points = [Point(0, losses["base"])] + ([Point(on_curve, losses["tuned"])] if on_curve else [])
    saved, notes = evaluated_run.saved_adapters(args.run, on_curve) if args.checkpoints else ({}, [])
    for at, path in saved.items():
        print(f"Measuring the adapter of step {at}", flush=True)
        bench.use(read_fitting(path, args.lora_alpha, skeletons))
        points.append(Point(at, Losses(*map(bench.measure, both))))
    if args.checkpoints and len(points) < 3:
        notes.append(loss_comparison.no_curve(points))
    return points, notes


# --- the story ---


def telling_whose_places(run):
    """Decorate what takes the arguments, so that its errors say which place is one of the run's settings."""

    @wraps(run)
    def call(args: argparse.Namespace) -> None:
        try:
            run(args)
        except UserError as error:
            for name in (*SOURCE, "pretrained_model_name_or_path", *COMPONENT_PLACES):
                place = args.run_settings.get(name)
                if place and place == getattr(args, name) and place in str(error) and not Path(place).exists():
                    raise UserError(
                        f"{error} This --{name} is that of {args.run / 'args.json'}, where a relative path starts at "
                        "the folder that the training was started in: start evaluate.py there, or give the flag."
                    ) from error
            raise

    return call


@telling_whose_places
def main(args: argparse.Namespace) -> None:
    """Measure, draw, score, and write the report."""
    validate_args(args)
    components.disable_progress_bars()
    args.mixed_precision = args.mixed_precision or processes.default_precision(os.environ)
    accelerator = processes.make_accelerator(os.environ, args.mixed_precision)
    device, make_bar = processes.device_of(accelerator), partial(processes.progress_bar, accelerator)
    dtype = components.weight_dtype(args.mixed_precision, device)

    # --- everything that can be wrong, before anything is loaded ---
    judge = miniature.load_judge(args.judge) if args.judge else None
    sources = sources_of(vars(args))
    folders = component_checks.fetch_checked(sources)
    skeletons = {name: components.skeleton(name, folders[name]) for name in ADAPTABLE}
    adapter = read_fitting(fetch_adapter(args.lora_weights, cache_dir=args.cache_dir), args.lora_alpha, skeletons)
    measured, notes = find_measured(args, make_bar)
    if judge and not miniature.is_one(components.read_config("unet", folders["unet"])):
        notes.append("The base is not the miniature: what the judge says of its pictures means nothing.")
    drawn, scenes = choose_pictures(args, measured)
    folders = {name: fetch(name, source) for name, source in sources.items()}
    scheduler = components.load_scheduler(folders["scheduler"], args.prediction_type)
    drawing.check_steps(scheduler, args.num_inference_steps)
    for prompt, length, most in prompts.too_long(list({one.prompt for one in drawn}), folders):
        notes.append(f"Only the first {most} of {length} tokens are used of: {prompt}")

    # --- what is encoded once ---
    sizes = imaging.crop_sizes(args.resolution, args.bucket_step_px if args.aspect_ratio_buckets else None)
    negative = components.negative_prompt(None, folders)
    texts = {one.prompt for one in drawn} | ({negative} - {None})
    latents, embeds = encode(args, folders, measured, texts, sizes, device, dtype, make_bar)
    make_samples = partial(
        samples.TrainingSamples,
        measured.column,
        measured.pictures,
        measured.captions,
        latents,
        None,  # the embeddings hang on the adapter
        seed=args.seed,
        sizes=sizes,
        interpolation=args.image_interpolation_mode,
        center_crop=True,
        random_flip=False,
        scaling_factor=components.read_config("vae", folders["vae"])["scaling_factor"],
        noise_offset=0.0,
        num_train_timesteps=scheduler.config.num_train_timesteps,
    )
    both = [make_samples(rows=rows) for rows in (measured.rows.held_out, measured.rows.trained)]

    # --- base and tuned: their losses, and what they draw ---
    pipeline, batch_size = Pipeline(folders, args.variant, device, dtype), args.run_settings.get("train_batch_size")
    batch_size = batch_size if type(batch_size) is int and batch_size > 0 else 4
    bench = evaluation.Bench(pipeline, scheduler, embeds, args.lora_scale, batch_size, negative)
    sampler = sdxl.make_sampler(scheduler, args.scheduler)
    options = {"num_inference_steps": args.num_inference_steps, "guidance_scale": args.guidance_scale}
    options |= {"height": args.resolution, "width": args.resolution}
    losses, latents_drawn = {}, {}
    for kind, merged in zip(KINDS, (None, adapter), strict=True):
        change = bench.use(merged)
        if change is not None:
            print(f"Merged {change.modules} modules of the unet: relative weight change {change.relative_change:.3e}")
        losses[kind] = Losses(*map(bench.measure, both))
        with make_bar(f"Drawing, {kind}", len(drawn)) as bar:
            latents_drawn[kind] = bench.draw(sampler, drawn, on_pictures=bar.update, **options)

    # --- the checkpoints' losses ---
    step = evaluated_run.steps_of_adapter(args.lora_weights, args.run, args.run_settings)
    if args.run and step is None:
        notes.append(
            "Nothing says after which step this adapter was written. If the run was begun again and has not ended, it "
            "is of the time before, and may have seen held-out pictures."
        )
    points, more = measure_curve(args, bench, both, losses, step, skeletons)
    notes += more
    best_step = checkpoint.best_step(args.run) if measured.rows.is_runs and args.lora_scale == 1 else None
    pipeline.drop_unet()

    # --- pictures and their scores ---
    images = {kind: [pipeline.decode(one[None])[0] for one in found] for kind, found in latents_drawn.items()}
    rows = data_survey.spread(len(measured.pictures), MOST_REFERENCES) if args.clip_model else []
    found = score(args, judge, scenes, device, drawn, images, [crop(args, measured, row, sizes) for row in rows])

    # --- the report ---
    settings = {name: value for name, value in vars(args).items() if name != "run_settings"}
    figures = {"settings": settings | {"run": str(args.run) if args.run else None}, "notes": notes, "step": step}
    figures["pictures"] = found
    timesteps = scheduler.config.num_train_timesteps
    figures["loss"] = loss_comparison.loss_figures(both[0], losses, points, timesteps, best_step)
    pairs = [
        evaluation_page.Pair(drawn[n], *(pages.as_jpeg(images[kind][n]) for kind in KINDS))
        for n in data_survey.spread(len(drawn), evaluation_page.MOST_PAIRS)
    ]
    best_first = [about["row"] for about in figures["loss"]["pictures"][: evaluation_page.MOST_HELD_OUT]]
    thumbnails = [pages.as_jpeg(crop(args, measured, row, sizes)) for row in best_first]
    output_dir = Path(args.output_dir)
    evaluation_page.write_report(output_dir, figures, pairs, thumbnails)
    print(f"\n{evaluation_page.as_text(figures)}\n\nThe report: {output_dir / 'evaluation.html'}")


if __name__ == "__main__":
    places = "--output_dir or --conditioning_cache_dir"
    processes.end(in_one_line(lambda: main(parse_args()), places, int(os.environ.get("RANK", 0))))

r"""Report on a data set before training: broken, small and duplicate pictures, crops that lose much, long captions.

    python scripts/check_data.py --train_data_dir pictures \
        --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0

It takes the data flags of the training, and finds, decodes and crops the pictures as training does. The report is
printed, and written to --output_dir with the pictures as they will be cropped. Nothing in the data set is changed.

Exit code: 0 if training would start, 2 if it would not; with --strict, 1 if it would start and there is any finding.
"""

import argparse
import logging
import os
import sys
from pathlib import Path

import datasets
from tqdm.auto import tqdm

from rasengan import UserError, captions, components, data, data_page, data_report, data_survey, imaging
from rasengan.command_line import Parser, conditioning_cache_dir, number_type, path_type
from rasengan.endings import in_one_line
from rasengan.files import check_writable, write_atomically
from rasengan.picture_files import save_png
from rasengan.sources import COMPONENT_FLAGS, component_sources, fetch


MOST_SHOWN = 200
MOST_IN_PNG = 64


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = Parser(__doc__, "Defaults stand in brackets. A switch is negated by --no-..., such as --no-center_crop.")
    add = parser.add_data_flags(imaging.INTERPOLATIONS)
    add("--seed", type=number_type(0, most=2**32 - 1), help="that of training, for --max_train_samples")
    add("--conditioning_cache_dir", type=path_type, help="what is known of pictures [training's, ~/.cache/rasengan]")

    # Only the tokenizer is fetched, and no weights.
    parser.add_base_flags({"tokenizer": COMPONENT_FLAGS["tokenizer"]})

    add = parser.add_argument_group("report").add_argument
    add("--output_dir", type=path_type, default="data-report", help="[%(default)s]")
    add("--strict", action="store_true", help="exit with 1 if there is any finding")
    args = parser.parse_args(argv)
    args.conditioning_cache_dir = conditioning_cache_dir(args.conditioning_cache_dir, os.environ)
    return args


def validate_args(args: argparse.Namespace) -> None:
    """Check what the arguments say by themselves."""
    data.check_settings(args.dataset_name, args.train_data_dir, args.resolution, args.bucket_step_px)
    if args.max_train_samples is not None and args.seed is None:
        raise UserError("--max_train_samples draws by training's --seed. Give that too.")
    data.check_outside(vars(args))
    for flag in ("output_dir", "conditioning_cache_dir"):
        check_writable(Path(getattr(args, flag)), f"--{flag}")


def find_pictures(
    args: argparse.Namespace,
) -> tuple[datasets.Dataset, list[imaging.Picture], tuple[list[str], list[str]]]:
    """Return the data set, what is known of each picture, and what `unlisted_files` are left out."""
    whole, dataset, pictures = data.find_pictures(
        vars(args), lambda description, total: tqdm(desc=description, total=total, dynamic_ncols=True)
    )
    left_out = [], []
    if args.dataset_name is None:
        left_out = data_survey.unlisted_files(args.train_data_dir, whole[args.image_column])
    return dataset, pictures, left_out


def find_long_captions(args: argparse.Namespace, usable: data_survey.Usable) -> list[captions.LongCaption] | None:
    """Return the captions of over 77 tokens; None where no base was given that would say how they are split."""
    overrides = {"tokenizer": args.pretrained_tokenizer_name_or_path}
    base = args.pretrained_model_name_or_path or overrides["tokenizer"]
    if base is None:
        return None
    sources = component_sources(base, overrides, args.revision, args.variant, args.cache_dir)
    tokenizer = components.load("tokenizer", fetch("tokenizer", sources["tokenizer"]))
    return captions.find_long_captions(usable.captions, usable.pictures, tokenizer) if usable.captions else []


def make_report(args: argparse.Namespace) -> tuple[data_report.Report, list[data_page.Tile], int]:
    """Return what there is to say, the pictures to show, and of how many these are."""
    sizes = imaging.crop_sizes(args.resolution, args.bucket_step_px if args.aspect_ratio_buckets else None)
    dataset, pictures, (unlisted, unknown) = find_pictures(args)
    usable = data_survey.usable_rows(dataset, args.caption_column, pictures)
    long_captions = find_long_captions(args, usable)
    column = dataset.select(usable.rows)[args.image_column]
    shown = data_survey.spread(len(column), MOST_SHOWN)
    with tqdm(desc="Looking at pictures", total=len(column), dynamic_ncols=True) as bar:
        how = (sizes, args.image_interpolation_mode)
        looks = data_survey.look_at_pictures(column, *how, shown, bar.update)
    directory = args.train_data_dir if args.dataset_name is None else None
    report = data_report.make_report(
        pictures,
        usable,
        looks,
        unlisted,
        data_survey.unread_captions(directory) if directory else [],
        long_captions,
        unknown=unknown,
        directory=directory,
        sizes=sizes,
        center_crop=args.center_crop,
        refused=data_survey.refusal(dataset, pictures, args.caption_column, args.skip_bad_images),
    )
    tiles = []
    for row in shown:
        picture = usable.pictures[row]
        name, size = data_report.short_name(picture.name, directory), f"{picture.width_px} x {picture.height_px}"
        tiles.append(data_page.Tile(name, size, usable.captions[row], looks[row].thumbnail))
    return report, tiles, len(looks)


def main(args: argparse.Namespace) -> int:
    """Print and write the report, and return the exit code.

    Raises:
        UserError: training would not start.
    """
    validate_args(args)
    report, tiles, picture_count = make_report(args)
    output_dir = Path(args.output_dir)
    page = output_dir / "data_report.html"
    crops = "center crops" if args.center_crop else "random crops, of which the center is shown"
    place = args.dataset_name or args.train_data_dir
    shapes = ", in buckets of that area" if args.aspect_ratio_buckets else ""
    settings = f"{place}: {args.resolution} px{shapes}, {crops}, {args.image_interpolation_mode}"
    write_atomically(page, data_page.as_page(report, settings, tiles, picture_count).encode())
    if tiles:
        few = [tiles[place] for place in data_survey.spread(len(tiles), MOST_IN_PNG)]
        save_png(output_dir / "data_contact_sheet.png", data_page.as_sheet(few))
    print(data_page.as_text(report, str(page)))
    print(f"The report with its pictures: {page}", flush=True)
    if report.refusal:
        raise UserError(report.refusal)
    return int(args.strict and bool(report.findings))


if __name__ == "__main__":
    # The report says what these would say.
    logging.getLogger("rasengan.data").setLevel(logging.ERROR)
    sys.exit(in_one_line(lambda: main(parse_args()), "--output_dir or --conditioning_cache_dir"))

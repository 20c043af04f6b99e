"""A tiny SDXL and a drawn picture set, so that everything else can be tried offline within seconds."""

import itertools
import json
import math
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from PIL import ExifTags, Image, ImageDraw, ImageFilter
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer


# The commonest letter pairs of English, commonest first: they roughly halve a caption's length in tokens.
_LETTER_PAIRS = (
    "th he in er an re on at en nd ti es or te of ed is it al ar st to nt ng se ha as ou io le ve co me de hi ri ro"
).split()
_START, _END = "<|startoftext|>", "<|endoftext|>"

Color = tuple[int, int, int]
Outline = list[tuple[float, float]]


def build_tiny_sdxl(directory: str | Path, seed: int = 0) -> None:
    """Write a randomly initialized SDXL of the smallest useful size, one folder per component.

    The folders are those of a diffusers SDXL checkpoint, with fp32 weights and without a ``model_index.json``. Equal
    seeds give byte-identical files, and the caller's random state is left as it was.
    """
    tokenizer, tokenizer_2 = _byte_tokenizer(pad_token=_END), _byte_tokenizer(pad_token="!")
    # Not torch.manual_seed, which would also reseed every GPU behind the caller's back.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        components = {
            "unet": _tiny_unet(),
            "vae": _tiny_vae(),
            "text_encoder": CLIPTextModel(_tiny_text_config(tokenizer, 32, 2, "quick_gelu")),
            "text_encoder_2": CLIPTextModelWithProjection(_tiny_text_config(tokenizer_2, 64, 3, "gelu")),
            "tokenizer": tokenizer,
            "tokenizer_2": tokenizer_2,
            "scheduler": EulerDiscreteScheduler(
                beta_schedule="scaled_linear",
                beta_start=0.00085,
                beta_end=0.012,
                prediction_type="epsilon",
                timestep_spacing="leading",
                steps_offset=1,
            ),
        }
    for name, component in components.items():
        component.save_pretrained(Path(directory) / name)


def _byte_tokenizer(pad_token: str) -> CLIPTokenizer:
    # Sorted, because the alphabet comes as a set; as in CLIP's own vocabulary, "!" then gets id 0.
    symbols = sorted(ByteLevel.alphabet())
    merges = [(first, last + end) for first, last in _LETTER_PAIRS for end in ("", "</w>")]
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols), *("".join(merge) for merge in merges)]
    # The end of text comes last: CLIP may look for it as the highest id of a caption.
    vocab = {token: index for index, token in enumerate([*tokens, _START, _END])}
    return CLIPTokenizer(vocab=vocab, merges=merges, pad_token=pad_token, model_max_length=77)


def _tiny_text_config(tokenizer: CLIPTokenizer, width: int, layers: int, hidden_act: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 16,
        projection_dim=width,
        hidden_act=hidden_act,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _tiny_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 64, 64),
        norm_num_groups=16,
        layers_per_block=2,
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(2, 4, 4),
        cross_attention_dim=32 + 64,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=64 + 6 * 32,
    )


def _tiny_vae() -> AutoencoderKL:
    return AutoencoderKL(
        sample_size=64,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 16, 32, 32),
        norm_num_groups=8,
        latent_channels=4,
        scaling_factor=0.13025,
        force_upcast=True,
    )


def _polygon(corners: int, inner: float = 1.0, turn_deg: float = 0.0) -> Outline:
    """Give the corners of a polygon in the unit circle, first one up, every second one ``inner`` from the center."""
    angles = [math.radians(turn_deg + 360 * corner / corners) for corner in range(corners)]
    radii = [inner if corner % 2 else 1.0 for corner in range(corners)]
    return [(r * math.sin(angle), -r * math.cos(angle)) for r, angle in zip(radii, angles, strict=True)]


def _heart() -> Outline:
    angles = [math.tau * step / 120 for step in range(120)]
    heights = [13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a) for a in angles]
    return [(math.sin(a) ** 3, -height / 16) for a, height in zip(angles, heights, strict=True)]


_SHAPES = {
    "circle": _polygon(120),
    "square": _polygon(4, turn_deg=45),
    "triangle": _polygon(3),
    "diamond": _polygon(4, inner=0.65),
    "hexagon": _polygon(6),
    "star": _polygon(10, inner=0.45),
    "heart": _heart(),
}
_COLORS = {
    "red": (222, 56, 49),
    "orange": (245, 138, 38),
    "yellow": (250, 208, 66),
    "green": (64, 160, 87),
    "teal": (38, 148, 158),
    "blue": (54, 101, 206),
    "purple": (124, 77, 178),
    "pink": (240, 135, 172),
    "brown": (128, 84, 58),
    "white": (250, 250, 250),
    "gray": (146, 146, 146),
    "black": (38, 38, 38),
}
_GRAYS = ("white", "gray", "black")
_RADII = {"small ": 0.14, "": 0.2, "big ": 0.27}
_ROWS = {"top": 0.0, "middle": 0.5, "bottom": 1.0}
_COLUMNS = {"left": 0.0, "center": 0.5, "right": 1.0}
# Mode, file type and EXIF orientation. Eight kinds share no factor with three aspects, so every pairing comes up.
_KINDS = (
    ("RGB", "jpg", 1),
    ("RGBA", "png", 1),
    ("L", "png", 1),
    ("RGB", "jpg", 6),
    ("P", "png", 1),
    ("RGB", "webp", 1),
    ("RGB", "png", 1),
    ("RGB", "jpg", 8),
)
# The turn to store a picture with so that a viewer who heeds its EXIF orientation sees it upright.
_STORED_TURN = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}


def draw_picture_set(directory: str | Path, count: int = 64, seed: int = 0, size_px: int = 64) -> None:
    """Draw captioned pictures of plain shapes as an image folder with a ``metadata.jsonl``.

    Sides are 0.75 to 2.5 times ``size_px``; aspects, modes and file types are mixed, and some JPEGs are stored turned
    and need their EXIF orientation. Captions hold for the upright picture, with transparency laid on white. Equal
    arguments give byte-identical files.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    lines = []
    for index in range(count):
        rng = random.Random(f"{seed}/{index}")
        mode, suffix, orientation = _KINDS[index % len(_KINDS)]
        short_px = rng.uniform(0.75, 1.5) * size_px
        long_px = rng.uniform(1.25, 1.66) * short_px
        width_px, height_px = ((short_px, long_px), (long_px, short_px), (short_px, short_px))[index % 3]
        image, caption = _draw_scene(rng, mode, (round(width_px), round(height_px)))

        exif = Image.Exif()
        if orientation != 1:
            image = image.transpose(_STORED_TURN[orientation])
            exif[ExifTags.Base.Orientation] = orientation
        file_name = f"{index:04d}.{suffix}"
        image.save(directory / file_name, quality=92, exif=exif or b"")
        lines.append(json.dumps({"file_name": file_name, "text": caption}) + "\n")
    (directory / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")


def _draw_scene(rng: random.Random, mode: str, size: tuple[int, int]) -> tuple[Image.Image, str]:
    names = list(_GRAYS if mode == "L" else _COLORS)
    ground = "white" if mode == "RGBA" else rng.choice(names)
    color = rng.choice([name for name in names if math.dist(_COLORS[name], _COLORS[ground]) > 125])
    pattern = "" if mode == "RGBA" else rng.choice(("", "dotted ", "striped "))
    shape, scale, row, column = (rng.choice(list(table)) for table in (_SHAPES, _RADII, _ROWS, _COLUMNS))

    canvas = Image.new("RGBA", size) if mode == "RGBA" else _shaded(_COLORS[ground], size)
    # Lighter than the ground, but darker on white, where nothing is lighter.
    tint = tuple(round(0.8 * part + 0.2 * (150 if ground == "white" else 255)) for part in _COLORS[ground])
    _lay(canvas, tint, _coverage(_pattern(pattern, size), size))

    radius = _RADII[scale] * min(size)
    x = 1.25 * radius + _COLUMNS[column] * (size[0] - 2.5 * radius)
    y = 1.25 * radius + _ROWS[row] * (size[1] - 2.5 * radius)
    shadow = _coverage([_moved(_SHAPES[shape], x, y + radius / 8, radius)], size)
    shadow = shadow.filter(ImageFilter.GaussianBlur(radius / 6)).point(lambda value: value * 0.35)
    _lay(canvas, (0, 0, 0), shadow)
    _lay(canvas, _COLORS[color], _coverage([_moved(_SHAPES[shape], x, y, radius)], size))

    image = canvas if mode == "RGBA" else canvas.convert("RGB").convert(mode, palette=Image.Palette.ADAPTIVE)
    return image, f"{_a(scale + color)} {shape} on {_a(pattern + ground)} background, {row} {column}"


def _pattern(name: str, size: tuple[int, int]) -> Iterator[Outline]:
    """Yield the outlines of a background's dots or slanted stripes, in px."""
    step = min(size) / 6
    columns, rows = (math.ceil(side / step) for side in size)
    if name == "dotted ":
        for row, column in itertools.product(range(rows), range(columns + 1)):
            yield _moved(_SHAPES["circle"], (column + row % 2 / 2) * step, (row + 0.5) * step, 0.2 * step)
    elif name == "striped ":
        for left in range(-rows, columns, 2):
            corners = ((left, 0), (left + 1, 0), (left + 1 + rows, rows), (left + rows, rows))
            yield [(x * step, (rows - y) * step) for x, y in corners]


def _moved(outline: Outline, x: float, y: float, radius: float) -> Outline:
    return [(x + radius * dx, y + radius * dy) for dx, dy in outline]


def _coverage(outlines: Iterable[Outline], size: tuple[int, int]) -> Image.Image:
    """Say how much of each pixel the outlines, in px, cover, from 0 to 255."""
    # Pillow draws hard edges; drawn at four times the size and averaged down, they come out smooth.
    mask = Image.new("L", (4 * size[0], 4 * size[1]))
    draw = ImageDraw.Draw(mask)
    for outline in outlines:
        draw.polygon([(4 * x, 4 * y) for x, y in outline], fill=255)
    return mask.reduce(4)


def _lay(canvas: Image.Image, color: Color, coverage: Image.Image) -> None:
    layer = _shaded(color, canvas.size)
    layer.putalpha(coverage)
    canvas.alpha_composite(layer)


def _shaded(color: Color, size: tuple[int, int]) -> Image.Image:
    """Fill a picture with a color that darkens a little towards the bottom."""
    dark = tuple(round(0.86 * part) for part in color)
    shade = Image.linear_gradient("L").resize(size)
    return Image.composite(Image.new("RGBA", size, dark), Image.new("RGBA", size, color), shade)


def _a(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"

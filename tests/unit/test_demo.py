import json
import random
import re

import datasets
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import ExifTags, Image, ImageOps
from safetensors.torch import load_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from rasengan import demo


CLASSES = {
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
    "tokenizer": CLIPTokenizer,
    "tokenizer_2": CLIPTokenizer,
    "scheduler": EulerDiscreteScheduler,
}
SIZE_PX = 96


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    directory = tmp_path_factory.mktemp("sdxl")
    demo.build_tiny_sdxl(directory)
    return directory


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    directory = tmp_path_factory.mktemp("pictures")
    demo.draw_picture_set(directory, size_px=SIZE_PX)
    return directory


def contents(directory):
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def captions(directory):
    rows = [json.loads(line) for line in (directory / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    return {row["file_name"]: row["text"] for row in rows}


def test_the_components_draw_a_finite_picture_that_depends_on_the_prompt(sdxl):
    components = {name: cls.from_pretrained(sdxl / name) for name, cls in CLASSES.items()}
    pipeline = StableDiffusionXLPipeline(**components, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)

    def draw(prompt):
        generator = torch.Generator().manual_seed(0)
        size = {"height": 64, "width": 64}
        return pipeline(prompt, num_inference_steps=2, generator=generator, output_type="np", **size).images

    star = draw("a red star")
    assert star.shape == (1, 64, 64, 3)
    assert np.isfinite(star).all()
    assert star.std() > 0
    assert not np.array_equal(star, draw("a blue circle on a green background, top left"))


def test_the_folder_holds_fp32_components_in_the_shape_of_sdxl_and_no_index(sdxl):
    assert sorted(path.name for path in sdxl.iterdir()) == sorted(CLASSES)
    for path in sdxl.rglob("*.safetensors"):
        assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float32}

    configs = {name: CLASSES[name].load_config(sdxl / name) for name in ("unet", "vae", "scheduler")}
    text, text_2 = (CLASSES[name].from_pretrained(sdxl / name).config for name in ("text_encoder", "text_encoder_2"))
    assert configs["unet"]["cross_attention_dim"] == text.hidden_size + text_2.hidden_size
    assert text.hidden_size != text_2.hidden_size
    assert (text.hidden_act, text_2.hidden_act) == ("quick_gelu", "gelu")
    assert len(configs["vae"]["block_out_channels"]) == 4
    assert (configs["vae"]["scaling_factor"], configs["vae"]["force_upcast"]) == (0.13025, True)
    expected = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
    expected |= {"num_train_timesteps": 1000, "prediction_type": "epsilon", "interpolation_type": "linear"}
    assert expected | {"timestep_spacing": "leading"} == {
        name: configs["scheduler"][name] for name in [*expected, "timestep_spacing"]
    }


@pytest.mark.parametrize(("name", "pad_token"), [("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")])
def test_a_tokenizer_loads_alike_from_its_folder_and_from_the_checkpoint(sdxl, name, pad_token):
    for tokenizer in (
        CLIPTokenizer.from_pretrained(sdxl / name),
        CLIPTokenizer.from_pretrained(sdxl, subfolder=name),
        CLIPTokenizer.from_pretrained(str(sdxl), subfolder=name),
    ):
        ids = tokenizer("the star", padding="max_length", truncation=True).input_ids
        words = [tokenizer.convert_tokens_to_ids(token) for token in ("th", "e</w>", "st", "ar</w>")]
        pad_id = tokenizer.convert_tokens_to_ids(pad_token)
        assert ids == [tokenizer.bos_token_id, *words, tokenizer.eos_token_id] + [pad_id] * 71
        assert tokenizer.pad_token == pad_token
        assert tokenizer.model_max_length == 77
        assert tokenizer("star " * 200, truncation=True).input_ids[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_2"])
def test_no_text_holds_an_unknown_token(sdxl, name):
    tokenizer = CLIPTokenizer.from_pretrained(sdxl / name)
    vocab = tokenizer.get_vocab()
    assert len(ByteLevel.alphabet()) == 256
    assert all(symbol in vocab and symbol + "</w>" in vocab for symbol in ByteLevel.alphabet())

    text = "".join(map(chr, range(0xD800))) + " 螺旋丸 らせんがん 나선환 🍥👩‍🎨🏳️‍🌈 \U0010ffff"
    # CLIP's unknown token is its end of text.
    assert tokenizer.unk_token_id not in tokenizer(text, add_special_tokens=False).input_ids
    assert "".join(tokenizer.decode(tokenizer("螺旋丸 🍥", add_special_tokens=False).input_ids).split()) == "螺旋丸🍥"


@pytest.mark.parametrize("number", ["", "_2"])
def test_the_pooled_text_comes_from_the_end_of_text(sdxl, number):
    tokenizer = CLIPTokenizer.from_pretrained(sdxl / f"tokenizer{number}")
    encoder = CLASSES[f"text_encoder{number}"].from_pretrained(sdxl / f"text_encoder{number}")
    assert tokenizer.eos_token_id == max(tokenizer.get_vocab().values()) == encoder.config.vocab_size - 1

    prompts = ["a red star", "a blue circle on a green background"]
    ends = [len(tokenizer(prompt).input_ids) - 1 for prompt in prompts]
    with torch.no_grad():
        batch = tokenizer(prompts, padding="max_length", return_tensors="pt")
        out = encoder(batch.input_ids, output_hidden_states=True)
        expected = out.last_hidden_state[[0, 1], ends]
        pooled = out.pooler_output if number == "" else out.text_embeds
        expected = expected if number == "" else encoder.text_projection(expected)
    torch.testing.assert_close(pooled, expected)
    assert out.hidden_states[-2].shape == (2, 77, encoder.config.hidden_size)


def test_equal_seeds_give_equal_checkpoints_and_others_differ_in_every_weight_file(sdxl, tmp_path):
    demo.build_tiny_sdxl(tmp_path / "same", seed=0)
    demo.build_tiny_sdxl(tmp_path / "other", seed=1)
    first, same, other = contents(sdxl), contents(tmp_path / "same"), contents(tmp_path / "other")
    assert first == same
    assert first.keys() == other.keys()
    weights = {name for name in first if name.endswith(".safetensors")}
    assert len(weights) == 4
    assert {name for name in first if first[name] != other[name]} == weights


def test_equal_seeds_give_equal_pictures_and_others_do_not(pictures, tmp_path):
    demo.draw_picture_set(tmp_path / "same", size_px=SIZE_PX)
    demo.draw_picture_set(tmp_path / "other", size_px=SIZE_PX, seed=1)
    assert contents(pictures) == contents(tmp_path / "same")
    assert captions(pictures) != captions(tmp_path / "other")


def test_the_callers_random_state_is_left_alone(tmp_path):
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()
    demo.build_tiny_sdxl(tmp_path / "sdxl", seed=5)
    demo.draw_picture_set(tmp_path / "pictures", seed=5)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    np.testing.assert_equal(np.random.get_state(), before[2])


def test_datasets_reads_every_picture_with_its_caption(pictures, tmp_path):
    files = {"train": f"{pictures}/**"}
    rows = datasets.load_dataset("imagefolder", data_files=files, split="train", cache_dir=str(tmp_path))
    assert rows.column_names == ["image", "text"]
    assert sorted(row["text"] for row in rows) == sorted(captions(pictures).values())
    assert all(row["image"].size > (1, 1) for row in rows)


def test_the_pictures_come_in_every_mode_aspect_and_size(pictures):
    paths = [pictures / name for name in captions(pictures)]
    assert len(paths) == 64
    assert {path.name for path in paths} == {path.name for path in pictures.iterdir()} - {"metadata.jsonl"}

    images = [Image.open(path) for path in paths]
    kinds = {(image.format, image.mode) for image in images}
    assert kinds == {("JPEG", "RGB"), ("PNG", "RGB"), ("PNG", "RGBA"), ("PNG", "L"), ("PNG", "P"), ("WEBP", "RGB")}
    assert {image.getexif().get(ExifTags.Base.Orientation) for image in images} == {None, 6, 8}
    assert all(image.getchannel("A").getextrema() == (0, 255) for image in images if image.mode == "RGBA")
    sizes = [ImageOps.exif_transpose(image).size for image in images]
    assert {(width > height) - (width < height) for width, height in sizes} == {-1, 0, 1}
    assert min(map(min, sizes)) < SIZE_PX < 2 * SIZE_PX < max(map(max, sizes))
    assert all(0.75 * SIZE_PX - 1 <= side <= 2.5 * SIZE_PX for size in sizes for side in size)


def test_every_caption_says_where_the_upright_picture_shows_its_color(pictures):
    assert len(set(captions(pictures).values())) > 50
    turned, untrue_as_stored = 0, 0
    for name, caption in captions(pictures).items():
        pattern = r"an? (?:big |small )?(\w+) \w+ on an? (?:\w+ )?\w+ background, (\w+ \w+)"
        color, place = re.fullmatch(pattern, caption).groups()
        image = Image.open(pictures / name)
        assert place_of(ImageOps.exif_transpose(image), color) == place, (name, caption)
        if ImageOps.exif_transpose(image).getexif() != image.getexif():
            turned += 1
            untrue_as_stored += place_of(image, color) != place
    assert turned == 16
    assert untrue_as_stored > 8


def place_of(image, color):
    rgba = image.convert("RGBA")
    pixels = np.asarray(Image.alpha_composite(Image.new("RGBA", image.size, "white"), rgba).convert("RGB"))
    # The pictures darken towards the bottom; hence any shade of the color counts.
    shades = np.linspace(1, 0.86, 8)[:, None, None, None] * np.array(demo._COLORS[color])
    rows, columns = np.nonzero(np.linalg.norm(pixels - shades, axis=-1).min(axis=0) < 30)
    y, x = rows.mean() / image.height - 0.5, columns.mean() / image.width - 0.5
    row = "middle" if abs(y) < 0.1 else "top" if y < 0 else "bottom"
    return f"{row} {'center' if abs(x) < 0.1 else 'left' if x < 0 else 'right'}"

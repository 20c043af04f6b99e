"""Pictures of the base and of the tuned model, and the proof that the adapter is in them."""

import base64
import io
import json
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image

from rasengan import UserError, components, drawing, merging, picture_files, processes, sdxl, sweep
from rasengan.pipeline import Pipeline
from rasengan.sources import COMPONENT_FLAGS, COMPONENTS


PROMPT = "a big red star"
CONFIG = Path(__file__).parents[2] / "accelerate_configs" / "cpu.yaml"
README = Path(__file__).parents[2] / "README.md"
TWO = ["--config_file", str(CONFIG), "--main_process_port", "0", "--num_processes", "2"]
BASE, TUNED = "000-3-a-big-red-star-base.png", "000-3-a-big-red-star-tuned.png"


def pixels(image) -> np.ndarray:
    return np.asarray(image.convert("RGB")).astype(int)


def same(one, other) -> bool:
    return np.array_equal(pixels(one), pixels(other))


@pytest.fixture(scope="module")
def compared(draw, trained):
    """Pictures of --compare, by file name."""
    return draw("--lora_weights", trained, "--compare", "--prompt", PROMPT, "--seed", 3)


def draw_with_diffusers(pipeline, **options) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    size = {"height": 64, "width": 64, "num_inference_steps": 3, "guidance_scale": 7.5}
    return pixels(pipeline(PROMPT, generator=generator, **size, **options).images[0])


def load_pipeline(tiny_base) -> StableDiffusionXLPipeline:
    loaded = {name: components.load(name, tiny_base / name) for name in COMPONENTS}
    return StableDiffusionXLPipeline(**loaded, add_watermarker=False)


# --- base and tuned ---


def test_compare_draws_both_and_a_grid_and_says_what_they_are_made_from(compared, trained, tiny_base):
    assert set(compared) == {BASE, TUNED, "grid.png"}
    assert compared["grid.png"].width > 2 * 256
    for name, adapter in ((BASE, "none"), (TUNED, f"{trained} at scale 1")):
        image = compared[name]
        image.load()
        assert image.size == (64, 64)
        said = {key: image.text[key] for key in ("prompt", "seed", "model", "adapter", "num_inference_steps")}
        assert said == {
            "prompt": PROMPT,
            "seed": "3",
            "model": str(tiny_base),
            "adapter": adapter,
            "num_inference_steps": "3",
        }


def test_tuned_pictures_differ_from_base_pictures(compared):
    difference = np.abs(pixels(compared[BASE]) - pixels(compared[TUNED]))
    assert (difference > 2).mean() > 0.1


def test_base_pictures_are_those_of_a_run_without_an_adapter_and_of_scale_0(compared, draw, trained):
    alone = draw("--prompt", PROMPT, "--seed", 3)
    assert list(alone) == [BASE]
    assert same(alone[BASE], compared[BASE])
    off = draw("--lora_weights", trained, "--lora_scale", 0, "--prompt", PROMPT, "--seed", 3)
    assert list(off) == [BASE]
    assert same(off[BASE], compared[BASE])


def test_a_smaller_scale_gives_a_picture_between_base_and_tuned(compared, draw, trained):
    half = draw("--lora_weights", trained, "--lora_scale", 0.5, "--prompt", PROMPT, "--seed", 3)[TUNED]
    whole = np.abs(pixels(compared[TUNED]) - pixels(compared[BASE])).mean()
    assert 0 < np.abs(pixels(half) - pixels(compared[BASE])).mean() < whole


def test_the_run_says_how_much_the_merge_changed(draw, trained, capsys):
    draw("--lora_weights", trained, "--prompt", PROMPT)
    printed = capsys.readouterr().out
    assert "Merged 136 modules of the unet at alpha 32 / rank 16 x 1: relative weight change" in printed
    assert "1 picture is in" in printed


@pytest.mark.parametrize("place", [".", "pytorch_lora_weights.safetensors", "checkpoint-4", "peft"])
def test_every_place_of_the_adapter_gives_the_same_picture(place, compared, draw, trained):
    assert same(draw("--lora_weights", trained / place, "--prompt", PROMPT, "--seed", 3)[TUNED], compared[TUNED])


def test_an_earlier_checkpoint_gives_another_picture(compared, draw, trained):
    earlier = draw("--lora_weights", trained / "checkpoint-2", "--prompt", PROMPT, "--seed", 3)
    assert not same(earlier[TUNED], compared[TUNED])


# --- against diffusers ---


def test_diffusers_draws_the_same_with_the_adapter_loaded_by_itself(compared, trained, tiny_base):
    pipeline = load_pipeline(tiny_base)
    assert np.abs(draw_with_diffusers(pipeline) - pixels(compared[BASE])).max() <= 1
    pipeline.load_lora_weights(trained)
    assert np.abs(draw_with_diffusers(pipeline) - pixels(compared[TUNED])).max() <= 1


def test_a_negative_prompt_is_the_one_of_diffusers(compared, draw, tiny_base):
    image = draw("--prompt", PROMPT, "--negative_prompt", "blue, dotted", "--seed", 3)[BASE]
    assert not same(image, compared[BASE])
    expected = draw_with_diffusers(load_pipeline(tiny_base), negative_prompt="blue, dotted")
    assert np.abs(expected - pixels(image)).max() <= 1
    assert image.text["negative_prompt"] == "blue, dotted"


@pytest.fixture
def with_index(tiny_base, tmp_path):
    """The tiny base with an index that says that no negative prompt is an empty one."""
    base = tmp_path / "base"
    base.mkdir()
    for name in COMPONENTS:
        (base / name).symlink_to(tiny_base / name)
    (base / "model_index.json").write_text('{"force_zeros_for_empty_prompt": false}')
    return base


def test_no_negative_prompt_is_what_the_bases_index_says(
    compared, draw, trained, tiny_base, with_index, save_script, tmp_path
):
    base = with_index
    where = ["--pretrained_model_name_or_path", base, "--prompt", PROMPT, "--seed", 3]
    image = draw(*where)[BASE]
    assert not same(image, compared[BASE])
    pipeline = load_pipeline(tiny_base)
    pipeline.register_to_config(force_zeros_for_empty_prompt=False)
    assert np.abs(draw_with_diffusers(pipeline) - pixels(image)).max() <= 1
    save_script.main(save_script.parse_args([str(base), str(tmp_path / "saved"), "--dtype", "fp32"]))
    again = draw("--pretrained_model_name_or_path", tmp_path / "saved", "--prompt", PROMPT, "--seed", 3)
    assert same(again[BASE], image)
    draw(*where, "--lora_weights", trained, "--save_merged", tmp_path / "tuned")
    assert json.loads((tmp_path / "tuned" / "model_index.json").read_text())["force_zeros_for_empty_prompt"] is False


def test_a_saved_merged_model_is_a_pipeline_that_draws_the_same(compared, draw, trained, tmp_path):
    draw("--lora_weights", trained, "--save_merged", tmp_path / "tuned")
    pipeline = StableDiffusionXLPipeline.from_pretrained(tmp_path / "tuned")
    assert np.abs(draw_with_diffusers(pipeline) - pixels(compared[TUNED])).max() <= 1
    again = draw("--pretrained_model_name_or_path", tmp_path / "tuned", "--prompt", PROMPT, "--seed", 3)
    assert same(again[BASE], compared[TUNED])


# --- prompts, seeds, samplers ---


def test_prompts_come_from_the_command_line_and_then_from_a_file(draw, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\ufeffein blauer Kreis\n\n  ナルト 忍者 🥷 \n../../etc/passwd\n", encoding="utf-8")
    pictures = draw("--prompt", "a star", 'a <b> & "c" / d', "--prompt_file", file)
    prompts = {name: image.text["prompt"] for name, image in pictures.items()}
    assert prompts == {
        "000-0-a-star-base.png": "a star",
        "001-0-a-b-c-d-base.png": 'a <b> & "c" / d',
        "002-0-ein-blauer-Kreis-base.png": "ein blauer Kreis",
        "003-0-ナルト-忍者-base.png": "ナルト 忍者 🥷",
        "004-0-etc-passwd-base.png": "../../etc/passwd",
    }
    assert len({image.tobytes() for image in pictures.values()}) == 5


def test_a_prompt_over_77_tokens_is_cut_and_that_is_said(draw, capsys):
    draw("--prompt", "red " * 90)
    assert "warning: only the first 77 of" in capsys.readouterr().out


def test_pictures_drawn_together_are_those_drawn_alone(draw):
    together = draw("--prompt", PROMPT, "--seed", 3, "--num_images_per_prompt", 2)
    assert list(together) == [BASE, BASE.replace("-3-", "-4-")]
    for seed, image in zip((3, 4), together.values(), strict=True):
        assert image.text["seed"] == str(seed)
        (alone,) = draw("--prompt", PROMPT, "--seed", seed).values()
        assert np.abs(pixels(alone) - pixels(image)).max() <= 1
    assert not same(*together.values())


def test_the_seeds_after_the_greatest_one_are_drawn_too(draw):
    pictures = draw("--prompt", PROMPT, "--seed", 2**63 - 1, "--num_images_per_prompt", 2)
    assert [image.text["seed"] for image in pictures.values()] == [str(2**63 - 1), str(2**63)]
    assert not same(*pictures.values())


@pytest.mark.parametrize("name", sorted(sdxl.SAMPLERS))
def test_every_sampler_draws(name, compared, draw):
    image = draw("--prompt", PROMPT, "--seed", 3, "--scheduler", name)[BASE]
    assert image.text["scheduler"] == name
    assert pixels(image).std() > 1
    if name != "ddim":  # which without noise is Euler's method in other variables: rounding decides
        assert same(image, compared[BASE]) == (name == "euler")  # the base's own


def test_sizes_are_heights_and_widths_and_default_to_the_models(draw, infer_script, tiny_base, tmp_path):
    (image,) = draw("--prompt", PROMPT, "--height", 72, "--width", 40).values()
    assert image.size == (40, 72)
    words = ["--pretrained_model_name_or_path", str(tiny_base), "--num_inference_steps", "1", "--prompt", PROMPT]
    infer_script.main(infer_script.parse_args([*words, "--width", "40", "--output_dir", str(tmp_path)]))
    side = 8 * json.loads((tiny_base / "unet" / "config.json").read_text())["sample_size"]
    assert [Image.open(file).size for file in tmp_path.glob("*.png")] == [(40, side)]


def test_a_picture_of_another_unet_keeps_its_file(infer_script, tiny_base, tmp_path):
    shutil.copytree(tiny_base / "unet", tmp_path / "unet")
    words = ["--pretrained_model_name_or_path", str(tiny_base), "--num_inference_steps", "1", "--prompt", PROMPT]
    words += ["--height", "64", "--width", "64", "--output_dir", str(tmp_path / "out")]
    for further in ([], ["--pretrained_unet_name_or_path", str(tmp_path / "unet")]):
        infer_script.main(infer_script.parse_args([*words, *further]))
    first, second = sorted((tmp_path / "out").glob("*.png"), key=lambda file: len(file.name))
    assert "pretrained_unet_name_or_path" not in Image.open(first).text
    assert Image.open(second).text["pretrained_unet_name_or_path"] == str(tmp_path / "unet")


def test_a_name_too_long_for_a_file_is_refused_before_anything_is_loaded(draw, refused, trained, loaded, tmp_path):
    words = ["--lora_weights", trained, "--prompt", PROMPT]
    refused("--save_merged: the name x+ has 230 bytes", draw, *words, "--save_merged", tmp_path / ("x" * 230))
    assert loaded == []


def test_no_sampler_does_a_step_of_none(tiny_base):
    scheduler = components.load("scheduler", tiny_base / "scheduler")
    for name in sdxl.SAMPLERS:
        assert len(drawing.timesteps_of(sdxl.make_sampler(scheduler, name), 10, 0.0)) == 0


def test_a_distilled_scheduler_takes_no_more_steps_than_it_was_made_for(tiny_base):
    scheduler = diffusers.LCMScheduler.from_config(components.load("scheduler", tiny_base / "scheduler").config)
    drawing.check_steps(scheduler, 50)
    with pytest.raises(UserError, match="--num_inference_steps is 60, but the scheduler has 50 timesteps"):
        drawing.check_steps(scheduler, 60)
    drawing.check_steps(sdxl.make_sampler(scheduler, "ddim"), 60)  # made from it, which keeps the number unused


def test_components_given_one_by_one_draw_the_same(compared, infer_script, tiny_base, trained, tmp_path):
    flags = [word for name, flag in COMPONENT_FLAGS.items() for word in (flag, str(tiny_base / name))]
    small = ["--height", "64", "--width", "64", "--num_inference_steps", "3", "--seed", "3", "--prompt", PROMPT]
    arguments = [*flags, *small, "--lora_weights", str(trained), "--output_dir", str(tmp_path)]
    infer_script.main(infer_script.parse_args(arguments))
    assert (tmp_path / TUNED).is_file()
    assert same(Image.open(tmp_path / TUNED), compared[TUNED])


# --- several variants ---


def test_a_sweep_draws_each_scale_and_a_grid_and_a_page(compared, draw, trained):
    pictures = draw("--lora_weights", trained, "--lora_scale", "0,0.5,1", "--prompt", PROMPT, "a ring", "--seed", 3)
    name = BASE.removesuffix("base.png")
    assert {f"{name}base.png", f"{name}LoRA-x-0.5.png", f"{name}LoRA-x-1.png", "grid.png"} < set(pictures)
    assert len(pictures) == 2 * 3 + 1
    assert pictures["grid.png"].width > 3 * 256
    assert same(pictures[f"{name}base.png"], compared[BASE])
    assert same(pictures[f"{name}LoRA-x-1.png"], compared[TUNED]), "each is merged into the base's weights"


def test_checkpoints_are_compared(compared, draw, trained):
    places = [trained / "checkpoint-2", trained / "checkpoint-4"]
    pictures = draw("--compare", "--lora_weights", *places, "--prompt", PROMPT, "--seed", 3)
    name = BASE.removesuffix("base.png")
    assert same(pictures[BASE], compared[BASE])
    assert same(pictures[f"{name}checkpoint-4-x-1.png"], compared[TUNED])
    assert not same(pictures[f"{name}checkpoint-2-x-1.png"], compared[TUNED])


def test_more_rows_than_a_grid_holds_go_into_further_ones(draw, trained):
    pictures = draw("--lora_weights", trained, "--compare", "--prompt", *[f"star {n}" for n in range(9)])
    assert {"grid-001.png", "grid-002.png"} < set(pictures)
    assert pictures["grid-002.png"].height < pictures["grid-001.png"].height / 4


def test_the_page_says_what_was_drawn(infer_script, tiny_base, trained, tmp_path):
    words = ["--pretrained_model_name_or_path", str(tiny_base), "--lora_weights", str(trained), "--compare"]
    words += ["--height", "64", "--width", "64", "--num_inference_steps", "1", "--prompt", "<b>bold</b>"]
    infer_script.main(infer_script.parse_args([*words, "--output_dir", str(tmp_path)]))
    page = (tmp_path / "contact_sheet.html").read_text(encoding="utf-8")
    assert "&lt;b&gt;bold&lt;/b&gt; (0)" in page
    assert page.count("data:image/jpeg;base64,") == 2
    assert f"{trained} at scale 1" in page


# --- from a picture ---


def test_a_picture_is_the_start_and_strength_says_how_far_it_goes(draw, tmp_path):
    Image.effect_mandelbrot((300, 200), (-2, -1, 1, 1), 50).convert("RGB").save(tmp_path / "start.png")
    start = ["--init_image", tmp_path / "start.png", "--prompt", PROMPT, "--num_inference_steps", 10]
    pictures = []
    for strength in (0, 0.3, 1):
        (image,) = draw(*start, "--width", 96, "--strength", strength).values()
        assert image.size == (96, 64)
        assert float(image.text["strength"]) == strength
        pictures.append(pixels(image))
    near, far = (np.abs(picture - pictures[0]).mean() for picture in pictures[1:])
    assert 0 < near < far


def test_a_picture_keeps_its_shape(infer_script, tiny_base, tmp_path):
    Image.new("RGB", (300, 200), "red").save(tmp_path / "start.jpg")
    words = ["--pretrained_model_name_or_path", str(tiny_base), "--init_image", str(tmp_path / "start.jpg")]
    words += ["--num_inference_steps", "2", "--prompt", PROMPT, "--output_dir", str(tmp_path / "out")]
    infer_script.main(infer_script.parse_args(words))
    (file,) = (tmp_path / "out").glob("*.png")
    assert Image.open(file).size == (160, 104)  # the area of the tiny base's 128 x 128, in multiples of 8


# --- prompts are encoded once ---


def test_a_prompt_that_was_encoded_needs_no_text_encoder(draw, loaded, trained):
    first = draw("--prompt", "a prompt that no other test has", "--negative_prompt", "nor this one")
    assert {"text_encoder", "text_encoder_2"} < set(loaded)
    loaded.clear()
    words = ["--prompt", "a prompt that no other test has", "--negative_prompt", "nor this one"]
    again = draw("--lora_weights", trained, "--compare", *words)
    assert not {"text_encoder", "text_encoder_2"} & set(loaded)
    assert same(*(next(iter(pictures.values())) for pictures in (first, again)))


# --- adapters of other layouts, and several ---


@pytest.fixture(scope="module")
def other(train):
    """Another run's adapter."""
    return train("--seed", 7, "--rank", 4, "--max_train_steps", 2, "--max_train_samples", 8)


def test_several_adapters_are_drawn_with_their_weights_in_any_order(compared, draw, trained, other, capsys):
    prompt = ["--prompt", PROMPT, "--seed", 3]
    capsys.readouterr()
    (both,) = draw(*prompt, "--lora", f"{trained}:0.5", "--lora", f"{other}:2", "--lora_scale", 0.5).values()
    printed = capsys.readouterr().out
    assert "Merged 136 modules of the unet at alpha 32 / rank 16 x 0.25 + alpha 8 / rank 4 x 1: relative" in printed
    assert both.text["adapter"] == f"{trained} at scale 0.25 + {other} at scale 1"
    (turned,) = draw(*prompt, "--lora", other, "--lora", f"{trained}:0.25").values()
    assert np.abs(pixels(both) - pixels(turned)).max() <= 1
    assert not same(both, compared[TUNED])
    assert same(draw(*prompt, "--lora", trained)[TUNED], compared[TUNED])
    assert same(draw(*prompt, "--lora", trained, "--lora", f"{other}:0")[TUNED], compared[TUNED])


def test_an_adapter_of_weight_0_is_left_out_whatever_it_adapts(compared, draw, train, trained, loaded, capsys):
    text = train("--train_text_encoder", "--max_train_steps", 1, "--max_train_samples", 2)
    loaded.clear()
    drawn = draw("--lora", trained, "--lora", f"{text}:0", "--prompt", PROMPT, "--seed", 3)[TUNED]
    assert same(drawn, compared[TUNED])
    assert drawn.text["adapter"] == f"{trained} at scale 1"
    assert not any("text_encoder" in name for name in loaded)
    printed = capsys.readouterr().out
    assert "of the text_encoder" not in printed
    assert "warning" not in printed


def test_diffusers_draws_the_same_with_both_adapters_fused(draw, trained, other, tiny_base):
    drawn = draw("--prompt", PROMPT, "--seed", 3, "--lora", f"{trained}:0.5", "--lora", f"{other}:1.5")[TUNED]
    pipeline = load_pipeline(tiny_base)
    pipeline.load_lora_weights(trained, adapter_name="one")
    pipeline.load_lora_weights(other, adapter_name="two")
    pipeline.set_adapters(["one", "two"], [0.5, 1.5])
    assert np.abs(draw_with_diffusers(pipeline) - pixels(drawn)).max() <= 1


def test_a_place_with_a_colon_that_exists_has_no_weight(compared, draw, trained, tmp_path):
    (tmp_path / "a:2").symlink_to(trained)
    assert same(draw("--prompt", PROMPT, "--seed", 3, "--lora", tmp_path / "a:2")[TUNED], compared[TUNED])


def test_wrong_ways_to_name_adapters_are_refused(draw, refused, trained):
    prompt = ["--prompt", PROMPT]
    both = ["--lora", trained, "--lora_weights", trained]
    refused("--lora_weights and --lora both name adapters. Give each by a --lora", draw, *prompt, *both)
    refused("does not end with a finite weight", draw, *prompt, "--lora", f"{trained}:nan")
    refused("--compare and --save_merged need an adapter", draw, *prompt, "--compare")


def test_a_single_merged_file_is_the_original_layout_of_the_merged_folder(compared, draw, trained, tmp_path):
    draw("--lora_weights", trained, "--save_merged", tmp_path / "tuned")
    draw("--lora_weights", trained, "--save_merged", tmp_path / "tuned.safetensors")
    assert {path.name for path in tmp_path.iterdir()} == {"tuned", "tuned.safetensors"}
    pipeline = StableDiffusionXLPipeline.from_single_file(
        str(tmp_path / "tuned.safetensors"), config=str(tmp_path / "tuned"), local_files_only=True
    )
    folder = StableDiffusionXLPipeline.from_pretrained(tmp_path / "tuned")
    for name in components.MODELS:
        found, expected = (getattr(of, name).state_dict() for of in (pipeline, folder))
        assert found.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[key]) for key, tensor in found.items()), name
    assert np.abs(draw_with_diffusers(pipeline) - pixels(compared[TUNED])).max() <= 1


# --- several processes ---


def test_two_processes_draw_what_one_does(run_script, tiny_base, trained, tmp_path):
    words = ["--pretrained_model_name_or_path", tiny_base, "--lora_weights", trained, "--compare", "--height", 64]
    words += ["--width", 64, "--num_inference_steps", 2, "--num_images_per_prompt", 2, "--negative_prompt", "grey"]
    words += ["--prompt", "a star", "a ring", "a disk"]
    folders = {}
    for name, launch in (("one", None), ("two", TWO)):
        options = ["--output_dir", tmp_path / name, "--conditioning_cache_dir", tmp_path / f"cache {name}"]
        finished = run_script("infer", *words, *options, launch=launch)
        assert finished.returncode == 0, finished.stderr
        assert finished.stdout.count("Merged 136 modules") == 1
        folders[name] = {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()}
    assert len(folders["one"]) == 3 * 2 * 2 + 2  # the grid and the page
    assert folders["one"] == folders["two"]


# --- little memory ---


def test_without_room_for_the_vae_pictures_are_decoded_at_the_end(compared, draw, trained, monkeypatch):
    monkeypatch.setattr(Pipeline, "decode_fits", lambda *_: False)
    pictures = draw("--lora_weights", trained, "--compare", "--prompt", PROMPT, "--seed", 3)
    assert pictures.keys() == compared.keys()
    assert all(same(pictures[name], compared[name]) for name in pictures)


def test_adapters_of_one_name_are_told_apart_by_their_folders(compared, draw, trained, other, tmp_path):
    for name, run in (("a", trained), ("b", other)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "lora.safetensors").symlink_to(run / "pytorch_lora_weights.safetensors")
    places = [tmp_path / name / "lora.safetensors" for name in "ab"]
    pictures = draw("--lora_weights", *places, "--prompt", PROMPT, "--seed", 3)
    name = BASE.removesuffix("base.png")
    assert set(pictures) == {f"{name}a-lora.safetensors-x-1.png", f"{name}b-lora.safetensors-x-1.png", "grid.png"}
    assert same(pictures[f"{name}a-lora.safetensors-x-1.png"], compared[TUNED])


def test_what_would_draw_or_save_the_base_alone_is_refused(draw, refused, trained, tmp_path):
    words = ["--prompt", PROMPT]
    refused("Every --lora has the weight 0", draw, *words, "--lora", f"{trained}:0")
    refused("--lora_weights names a place twice", draw, *words, "--lora_weights", trained, trained)
    one = ["--lora_weights", trained]
    refused("--compare at --lora_scale 0 has the base on both", draw, *words, *one, "--compare", "--lora_scale", 0)
    refused("--save_merged at --lora_scale 0", draw, *one, "--lora_scale", 0, "--save_merged", tmp_path / "merged")
    refused(
        "--save_merged writes one model", draw, *one, "--lora_scale", "0.5,1", "--save_merged", tmp_path / "merged"
    )
    refused(
        "holds 1.0 and 1.00000001, which are both shown as 1", draw, *words, *one, "--lora_scale", "0,1,1.00000001"
    )
    refused("is not a number, nor several", draw, *words, *one, "--lora_scale", "1,x")
    refused("--strength acts on --init_image", draw, *words, "--strength", 0.5)
    refused("--vram_budget_gib is of a GPU's memory", draw, *words, "--vram_budget_gib", 8)
    refused("is no step", draw, *words, "--init_image", README, "--strength", 0.01)


def test_a_start_that_is_no_picture_is_named(draw, refused, tmp_path):
    (tmp_path / "empty.png").touch()
    Image.new("RGB", (64, 64)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:-30])
    for file, reason in (
        (README, "it is no picture of a known format"),
        (tmp_path / "empty.png", "it is no picture of a known format"),
        (tmp_path / "cut.png", "image file is truncated"),
        (tmp_path, "Is a directory"),
        (tmp_path / "absent.png", "No such file"),
    ):
        message = refused(
            f"--init_image {file} cannot be read: .*{reason}", draw, "--prompt", "a", "--init_image", file
        )
        assert message.count(str(file)) == 1
        assert "BytesIO" not in message
        assert message.endswith(". Give a picture.")


def test_variants_that_a_file_name_does_not_tell_apart_are_all_there(draw, trained, tmp_path):
    pictures = draw("--lora_weights", trained, "--lora_scale", "1,-1", "--prompt", PROMPT)
    assert len(pictures) == 3
    (tmp_path / "a b").symlink_to(trained)
    (tmp_path / "a-b").symlink_to(trained / "checkpoint-2")
    pictures = draw("--lora_weights", tmp_path / "a b", tmp_path / "a-b", "--prompt", PROMPT)
    assert len(pictures) == 3
    assert len({image.tobytes() for name, image in pictures.items() if name != "grid.png"}) == 2


def test_runs_into_one_folder_lose_no_picture_and_show_the_last_run(compared, draw, trained, other, tmp_path):
    words = ["--prompt", PROMPT, "--seed", 3, "--output_dir", tmp_path]
    Image.new("RGB", (8, 8)).save(tmp_path / "grid-001.png")  # somebody else's
    draw("--lora_weights", trained, "--compare", *words)
    (tmp_path / "grid-of-mine.png").write_bytes((tmp_path / "grid.png").read_bytes())
    second = TUNED.replace(".png", "-2.png")
    for _ in range(2):  # the same again changes nothing
        draw("--lora_weights", trained, "--lora_scale", 0.5, *words)
        names = {BASE, TUNED, second, "contact_sheet.html", "grid-001.png", "grid-of-mine.png"}
        assert {path.name for path in tmp_path.iterdir()} == names
    draw("--lora_weights", other, *words)
    pictures = {path.name: Image.open(path) for path in tmp_path.glob("000-*")}
    assert same(pictures[BASE], compared[BASE])
    assert same(pictures[TUNED], compared[TUNED])
    said = {name: image.text["adapter"] for name, image in pictures.items()}
    third = TUNED.replace(".png", "-3.png")
    assert said == {
        BASE: "none",
        TUNED: f"{trained} at scale 1",
        second: f"{trained} at scale 0.5",
        third: f"{other} at scale 1",
    }
    page = (tmp_path / "contact_sheet.html").read_text(encoding="utf-8")
    assert f"{other} at scale 1" in page
    assert f"{trained} at scale" not in page


def test_a_run_into_the_same_folder_meanwhile_keeps_its_picture(draw, tmp_path, monkeypatch):
    decode, other = sweep.decode, Image.new("RGB", (8, 8), "red")

    def decode_later(pipeline, pictures, *rest):
        for picture in pictures.values():
            picture_files.save_png(picture.file, other, {"made": "otherwise"})
        decode(pipeline, pictures, *rest)

    monkeypatch.setattr(sweep, "decode", decode_later)
    draw("--prompt", PROMPT, "--seed", 3, "--output_dir", tmp_path)
    drawn = {path.name: Image.open(path) for path in tmp_path.glob("*.png")}
    assert set(drawn) == {BASE, BASE.replace(".png", "-2.png")}
    assert same(drawn[BASE], other)
    drawn_now = io.BytesIO()
    drawn[BASE.replace(".png", "-2.png")].convert("RGB").save(drawn_now, "JPEG", quality=88)
    assert base64.b64encode(drawn_now.getvalue()).decode() in (tmp_path / "contact_sheet.html").read_text()


def test_grids_of_an_earlier_run_with_more_pages_go(draw, trained, tmp_path):
    words = ["--lora_weights", trained, "--compare", "--num_inference_steps", 1, "--output_dir", tmp_path, "--prompt"]
    draw(*words, *[f"star {n}" for n in range(9)])
    assert {path.name for path in tmp_path.glob("grid*")} == {"grid-001.png", "grid-002.png"}
    draw(*words, "a ring")
    assert {path.name for path in tmp_path.glob("grid*")} == {"grid.png"}


def test_a_decode_that_takes_the_unets_place_loses_no_picture(compared, draw, trained, monkeypatch):
    decode, failed = drawing.decode, []

    def full_at_first(vae, latents):
        if not failed:
            failed.append(1)
            raise torch.OutOfMemoryError
        return decode(vae, latents)

    monkeypatch.setattr(drawing, "decode", full_at_first)
    pictures = draw("--lora_weights", trained, "--prompt", PROMPT, "a ring", "--seed", 3)
    assert len(pictures) == 2
    assert same(pictures[TUNED], compared[TUNED])


@pytest.mark.parametrize("name", ["mm.ckpt", "mm.SAFETENSORS", "a/mm.bin", "mm.PT"])
def test_a_merged_model_takes_no_name_of_another_file_of_weights(draw, refused, trained, tmp_path, name):
    said = f"--save_merged is {tmp_path / name}, but a file that is written ends in .safetensors. Give this ending"
    refused(said, draw, "--lora_weights", trained, "--save_merged", tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_merged_model_goes_into_folders_that_are_not_there_yet(draw, trained, tmp_path):
    for name in ("tuned", "tuned.safetensors"):
        draw("--lora_weights", trained, "--save_merged", tmp_path / "a" / name / name)
        assert (tmp_path / "a" / name / name).exists()


@pytest.mark.parametrize("name", ["tuned", "tuned.safetensors"])
def test_a_merged_model_is_written_by_one_run_at_a_time_and_over_none(draw, trained, tmp_path, monkeypatch, name):
    merge, words = merging.merge, ["--lora_weights", trained, "--save_merged", tmp_path / name]

    def second_run(*_):
        monkeypatch.setattr(merging, "merge", merge)
        with pytest.raises(UserError, match=f"{name}.* is in use by another run .*or give another --save_merged"):
            draw(*words)
        (tmp_path / name).touch()
        raise UserError("the first run fails")

    monkeypatch.setattr(merging, "merge", second_run)
    with pytest.raises(UserError, match="the first run fails"):
        draw(*words)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    with pytest.raises(UserError, match=f"--save_merged .*{name} exists"):
        draw(*words)


def test_a_long_negative_prompt_is_cut_and_that_is_said(draw, capsys):
    draw("--prompt", PROMPT, "--negative_prompt", "grey " * 90)
    assert "warning: only the first 77 of" in capsys.readouterr().out


def test_a_launcher_that_asks_for_a_cpu_or_a_precision_is_heard(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for environment, expected in (
        ({}, "fp16"),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, "fp16"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "bf16"),
        ({"ACCELERATE_USE_CPU": "true"}, "no"),
    ):
        assert processes.default_precision(environment) == expected

"""Pairs of pictures from a model that stays in memory: those of infer.py, request after request."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from rasengan import UserError, components, memory
from rasengan.adapter_reader import read_adapter
from rasengan.adapters import Adapter
from rasengan.pairs import REMEMBERED, PairDrawer, Settings
from rasengan.pipeline import Pipeline
from rasengan.sources import COMPONENTS


SETTINGS = Settings("a big red star", None, 3, 3, 7.5, 64, 64, None)
NAME = "000-3-a-big-red-star-{}.png"


@pytest.fixture(scope="module")
def drawer(tiny_base) -> PairDrawer:
    folders = {name: tiny_base / name for name in COMPONENTS}
    return PairDrawer(Pipeline(folders, None, torch.device("cpu"), torch.float32))


@pytest.fixture(scope="module")
def adapter(trained) -> Adapter:
    return read_adapter(trained)


def same(one, other) -> bool:
    return np.array_equal(np.asarray(one), np.asarray(other.convert("RGB")))


@pytest.mark.parametrize(
    ("changes", "flags"),
    [
        ({}, []),
        ({"negative_prompt": "blue, dotted"}, ["--negative_prompt", "blue, dotted"]),
        ({"scheduler": "heun", "guidance_scale": 1.0}, ["--scheduler", "heun", "--guidance_scale", 1]),
        ({"scheduler": "euler_a", "height": 72}, ["--scheduler", "euler_a", "--height", 72]),
    ],
)
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_a_pair_is_what_infer_draws(changes, flags, scale, drawer, adapter, draw, trained):
    pair = drawer.draw(SETTINGS._replace(**changes), adapter, scale)
    words = ["--lora_weights", trained, "--lora_scale", scale, "--compare", "--prompt", SETTINGS.prompt, "--seed", 3]
    drawn = draw(*words, *flags)
    assert same(pair.base, drawn[NAME.format("base")])
    assert same(pair.tuned, drawn[NAME.format("tuned")])
    assert not same(pair.base, pair.tuned)
    assert pair.changes["unet"].modules == 136


def test_the_prediction_type_of_the_training_is_drawn_with(drawer, adapter, draw, trained):
    pair = PairDrawer(drawer.pipeline, "v_prediction").draw(SETTINGS, adapter, 1.0)
    words = ["--lora_weights", trained, "--compare", "--prompt", SETTINGS.prompt, "--seed", 3]
    drawn = draw(*words, "--prediction_type", "v_prediction")
    assert same(pair.base, drawn[NAME.format("base")])
    assert same(pair.tuned, drawn[NAME.format("tuned")])


def test_scale_0_is_the_base_and_the_base_comes_back_after_any_adapter(drawer, adapter):
    first = drawer.draw(SETTINGS, adapter, 0.0)
    assert same(first.base, first.tuned)
    assert not first.changes
    whole = drawer.draw(SETTINGS, adapter, 1.0)
    drawer.bases.clear()
    again = drawer.draw(SETTINGS, adapter, 2.0)
    assert same(again.base, first.base)
    assert not same(again.tuned, whole.tuned)
    assert same(drawer.draw(SETTINGS, adapter, 1.0).tuned, whole.tuned)


def test_an_adapter_of_the_text_encoders_is_drawn_as_infer_draws_it(drawer, adapter, draw, tmp_path):
    torch.manual_seed(0)
    name = "text_model.encoder.layers.0.self_attn.q_proj"
    width = components.load("text_encoder", drawer.pipeline.folders["text_encoder"]).config.hidden_size
    tensors = {
        f"lora_te1_{name.replace('.', '_')}.lora_down.weight": torch.randn(4, width),
        f"lora_te1_{name.replace('.', '_')}.lora_up.weight": torch.randn(width, 4),
        f"lora_te1_{name.replace('.', '_')}.alpha": torch.tensor(4.0),
    }
    file = tmp_path / "texts.safetensors"
    save_file(tensors, file)
    pair = drawer.draw(SETTINGS, read_adapter(file), 1.0)
    drawn = draw("--lora_weights", file, "--compare", "--prompt", SETTINGS.prompt, "--seed", 3)
    assert same(pair.base, drawn[NAME.format("base")])
    assert same(pair.tuned, drawn[NAME.format("tuned")])
    assert not same(pair.base, pair.tuned)
    assert pair.changes.keys() == {"text_encoder"}
    drawer.bases.clear()
    assert same(drawer.draw(SETTINGS, adapter, 1.0).base, pair.base)


def test_each_model_is_loaded_once_and_the_base_drawn_once(drawer, adapter, loaded):
    drawer.draw(SETTINGS, adapter, 1.0)
    loaded.clear()
    steps = []
    for scale in (0.25, 0.75):
        drawer.draw(SETTINGS, adapter, scale, on_step=lambda picture, step: steps.append((picture, step)))
    assert not loaded
    assert steps == 2 * [("tuned", step) for step in range(4)]


def test_only_the_last_base_pictures_are_kept(drawer, adapter):
    for seed in range(REMEMBERED + 2):
        drawer.draw(SETTINGS._replace(seed=seed, num_inference_steps=1), adapter, 0.0)
    assert [settings.seed for settings in drawer.bases] == list(range(2, REMEMBERED + 2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": " \n"}, "The prompt is empty"),
        ({"prompt": None}, "The prompt is None|The prompt is empty"),
        ({"prompt": ["a"]}, r"The prompt is \['a'\]. Give a text"),
        ({"negative_prompt": 5}, "The negative prompt is 5. Give a text"),
        ({"scheduler": ["ddim"]}, r"The scheduler is \['ddim'\]. Give a text"),
        ({"prompt": "a" * 4001}, "The prompt has 4001 characters"),
        ({"negative_prompt": "a" * 4001}, "The negative prompt has 4001"),
        ({"seed": -2}, "The seed is -2. Give a whole number from 0 to 4294967295"),
        ({"seed": None}, "The seed is None"),
        ({"seed": 1.5}, "The seed is 1.5"),
        ({"num_inference_steps": 0}, "The number of steps is 0. Give a whole number from 1 to 150"),
        ({"num_inference_steps": 10**9}, "The number of steps is 1000000000"),
        ({"guidance_scale": float("nan")}, "The guidance scale is nan"),
        ({"guidance_scale": "7"}, "The guidance scale is '7'"),
        ({"height": 100}, "The height is 100 px. Give a multiple of 8"),
        ({"width": 10**6}, "The width is 1000000. Give a whole number from 64 to 2048"),
        ({"scheduler": "../ddim"}, "There is no sampler '../ddim'"),
        ({"negative_prompt": "blue", "guidance_scale": 1.0}, "does nothing at a guidance scale of 1"),
        ({"lora_scale": float("inf")}, "The LoRA scale is inf. Give a number from 0 to 2"),
        ({"lora_scale": None}, "The LoRA scale is None"),
    ],
)
def test_values_that_cannot_be_drawn_with_are_refused(changes, message, drawer, adapter, refused):
    scale = changes.get("lora_scale", 1.0)
    changes = {name: value for name, value in changes.items() if name != "lora_scale"}
    refused(message, drawer.draw, SETTINGS._replace(**changes), adapter, scale)


def test_an_adapter_that_does_not_fit_is_refused_before_anything_is_drawn_and_the_next_is_drawn(drawer, adapter):
    expected = drawer.draw(SETTINGS, adapter, 1.0)
    drawer.bases.clear()
    steps = []
    wrong = {key: tensor[:, :1] if "lora_A" in key else tensor for key, tensor in adapter.weights["unet"].items()}
    idle = {key: torch.zeros_like(tensor) for key, tensor in adapter.weights["unet"].items()}
    for weights, message in ((wrong, "The adapter does not fit the unet"), (idle, "changes nothing in the unet")):
        with pytest.raises(UserError, match=message):
            drawer.draw(SETTINGS, adapter._replace(weights={"unet": weights}), 1.0, lambda _, step: steps.append(step))
    assert not any(steps)
    pair = drawer.draw(SETTINGS, adapter, 1.0)
    assert same(pair.base, expected.base)
    assert same(pair.tuned, expected.tuned)


def test_without_room_at_all_it_says_so_and_goes_on(drawer, adapter, monkeypatch):
    def crowded(*_, **__):
        raise torch.OutOfMemoryError("no room")

    expected = drawer.draw(SETTINGS, adapter, 1.0)
    with monkeypatch.context() as patch:
        patch.setattr(drawer.pipeline, "use", crowded)
        with pytest.raises(memory.DoesNotFit, match="more memory than the card has left"):
            drawer.draw(SETTINGS, adapter, 1.0)
    assert same(drawer.draw(SETTINGS, adapter, 1.0).tuned, expected.tuned)


def test_a_text_that_is_cut_off_is_told(drawer):
    assert drawer.warnings(SETTINGS) == []
    (sentence,) = drawer.warnings(SETTINGS._replace(negative_prompt="red " * 90))
    assert sentence.startswith("Only the first 77 of the ")
    assert sentence.endswith(" tokens of the negative prompt are used.")

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image, ImageFont

from rasengan import components, lora, sdxl, validation


@pytest.fixture
def models(tiny_base):
    """An adapted UNet and an adapted text encoder, in training, with dropout in their LoRA."""
    models = [components.load(name, tiny_base / name) for name in ("unet", "text_encoder")]
    for model, targets in zip(models, (lora.UNET_TARGETS, lora.TEXT_ENCODER_TARGETS), strict=True):
        lora.add_lora(model, lora.lora_config(4, 8.0, targets, dropout=0.5))
        for name, parameter in lora.trainable_parameters(model).items():
            if ".lora_B." in name:
                torch.nn.init.normal_(parameter)
        model.train()
    return models


def answers(unet, text_encoder):
    """What both say to a fixed input; a gradient is kept."""
    generator = torch.Generator().manual_seed(1)
    sample, states, pooled = (torch.randn(s, generator=generator) for s in ((2, 4, 8, 8), (2, 5, 96), (2, 64)))
    added = {"text_embeds": pooled, "time_ids": torch.full((2, 6), 64.0)}
    said = text_encoder(torch.arange(18).reshape(2, 9)).last_hidden_state
    return unet(sample, torch.tensor([3, 700]), states, added_cond_kwargs=added).sample, said


def equal(ones, others):
    return [torch.equal(one, other) for one, other in zip(ones, others, strict=True)]


# --- the models' modes ---


def test_without_adapters_the_models_are_the_base_and_with_them_again_what_they_were(tiny_base, models):
    base = answers(*(components.load(name, tiny_base / name) for name in ("unet", "text_encoder")))
    for model in models:
        model.eval()
    tuned = answers(*models)
    assert equal(tuned, base) == [False, False]
    with validation.adapters_disabled(models):
        assert equal(answers(*models), base) == [True, True]
    assert equal(answers(*models), tuned) == [True, True]


def test_after_an_error_the_adapters_are_on_again(models):
    for model in models:
        model.eval()
    tuned = answers(*models)
    with pytest.raises(KeyboardInterrupt), validation.adapters_disabled(models):
        raise KeyboardInterrupt
    assert equal(answers(*models), tuned) == [True, True]


def test_training_goes_on_after_the_adapters_were_off(models):
    trainable = lora.trainable_parameters(*models)
    flat = lora.flatten_parameters(list(trainable.values()))
    with validation.evaluating(models), validation.adapters_disabled(models):
        answers(*models)
    assert list(lora.trainable_parameters(*models)) == list(trainable)
    sum(answer.square().mean() for answer in answers(*models)).backward()
    assert all(parameter.grad.any() for parameter in trainable.values())
    assert flat.grad.count_nonzero() == sum(parameter.grad.count_nonzero() for parameter in trainable.values())


def test_evaluation_has_no_dropout_and_ends_in_training_mode(models):
    before = [module.training for model in models for module in model.modules()]
    assert all(before)
    assert equal(answers(*models), answers(*models)) == [False, False]
    with validation.evaluating(models):
        assert not any(module.training for model in models for module in model.modules())
        assert equal(answers(*models), answers(*models)) == [True, True]
    assert [module.training for model in models for module in model.modules()] == before
    with pytest.raises(KeyboardInterrupt), validation.evaluating(models):
        raise KeyboardInterrupt
    assert [module.training for model in models for module in model.modules()] == before


# --- drawing ---


def test_each_prompt_is_drawn_with_each_seed_prompt_by_prompt(tiny_base):
    unet, vae, scheduler = (components.load(name, tiny_base / name) for name in ("unet", "vae", "scheduler"))
    generator = torch.Generator().manual_seed(0)
    prompts = [(torch.randn(7, 96, generator=generator), torch.randn(64, generator=generator)) for _ in range(2)]
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    images = validation.draw_share(accelerator, unet, vae, scheduler, prompts, [5, 6], 64, 2)
    expected = [
        sdxl.draw(unet, vae, scheduler, sdxl.conditioning(prompt, None, 1), [seed], 64, 64, 2, 5.0)[0]
        for prompt in prompts
        for seed in (5, 6)
    ]
    assert [image.tobytes() for image in images] == [image.tobytes() for image in expected]
    assert len({image.tobytes() for image in images}) == 4


def test_a_picture_with_non_finite_values_is_grey_and_warned_of(tiny_base, caplog):
    unet, vae, scheduler = (components.load(name, tiny_base / name) for name in ("unet", "vae", "scheduler"))
    generator = torch.Generator().manual_seed(0)
    prompts = [(torch.randn(7, 96, generator=generator), torch.randn(64, generator=generator)) for _ in range(2)]
    prompts[0][0][3, 3] = float("nan")
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    broken, whole = validation.draw_share(accelerator, unet, vae, scheduler, prompts, [5], 64, 2)
    assert broken.size == whole.size == (64, 64)
    assert broken.getextrema() == ((128, 128),) * 3
    assert whole.getextrema() != broken.getextrema()
    (record,) = [record for record in caplog.records if record.name == "rasengan.validation"]
    assert "seed 5 came out with non-finite values" in record.getMessage()
    assert "--lora_scale" not in record.getMessage()


def test_a_picture_that_does_not_fit_is_grey_and_warned_of(tiny_base, caplog):
    unet, vae, scheduler = (components.load(name, tiny_base / name) for name in ("unet", "vae", "scheduler"))
    generator = torch.Generator().manual_seed(0)
    prompts = [(torch.randn(7, 96, generator=generator), torch.randn(64, generator=generator)) for _ in range(2)]
    calls = []

    def full_at_first(*_):
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError

    unet.register_forward_pre_hook(full_at_first)
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    missing, drawn = validation.draw_share(accelerator, unet, vae, scheduler, prompts, [5], 64, 2)
    assert missing.getextrema() == ((128, 128),) * 3
    assert drawn.getextrema() != missing.getextrema()
    (record,) = [record for record in caplog.records if record.name == "rasengan.validation"]
    assert "seed 5 does not fit into the card's memory" in record.getMessage()


# --- grids ---


def pixels(image, *box):
    return np.asarray(image.crop(box) if box else image, dtype=int)


@pytest.mark.parametrize("size", [(512, 512), (320, 200), (64, 96)])
def test_a_grid_holds_each_picture_in_its_place_under_its_labels(size):
    colors = [["red", "lime", "blue"], ["cyan", "magenta", "yellow"]]
    rows = [[Image.new("RGB", size, color) for color in row] for row in colors]
    grid = validation.image_grid(rows, ["first", "second"], ["base", "LoRA x 1", "other"])
    width = max(256, size[0])
    height, margin = round(size[1] * width / size[0]), width // 32
    assert grid.mode == "RGB"
    assert grid.width == margin + 3 * (width + margin)

    tops = []
    array = pixels(grid)
    for row in colors:
        for column, color in enumerate(row):
            ys, xs = np.nonzero((array == Image.new("RGB", (1, 1), color).getpixel((0, 0))).all(axis=-1))
            left = margin + column * (width + margin)
            assert (xs.min(), xs.max()) == (left, left + width - 1)
            assert ys.max() - ys.min() == height - 1
            assert len(xs) == width * height
        tops.append(ys.min())
    assert tops[1] >= tops[0] + height + margin
    assert grid.height >= tops[1] + height + margin

    # Every label, and nothing else, is ink on the white around the pictures.
    column_labels, first, second = (
        array[: tops[0] // 2],
        array[tops[0] // 2 : tops[0]],
        array[tops[0] + height : tops[1]],
    )
    for column in range(3):
        left = margin + column * (width + margin)
        ink = np.nonzero((column_labels[:, left : left + width] < 128).all(axis=-1))[1]
        assert abs((ink.min() + ink.max()) / 2 - width / 2) < 3
    for strip in (first, second):
        assert (strip < 160).all(axis=-1).any()
        assert (strip[:, grid.width // 2 :] == 255).all()
    assert (array[:, : margin - 1] == 255).all()


def test_a_picture_keeps_its_content_and_what_is_smaller_fits_its_cell():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8))
    grid = validation.image_grid([[picture, Image.new("L", (100, 100), 0)]], ["a prompt"], ["base", "tuned"])
    top = grid.height - 9 - 300
    assert (pixels(grid, 9, top, 309, top + 300) == pixels(picture)).all()
    assert (pixels(grid, 318, top, 618, top + 300) == 0).all()


def test_a_row_without_a_picture_for_each_column_is_an_error():
    with pytest.raises(ValueError):
        validation.image_grid([[Image.new("RGB", (8, 8))]], ["a"], ["base", "tuned"])


@pytest.mark.parametrize(
    ("row_label", "column_label"),
    [
        ("a wizard in a forest of giant mushrooms " * 9, "LoRA"),
        ("in heavy rain under a red umbrella, cinematic lighting, by a master painter " * 9, "LoRA"),
        ("supercalifragilistic" * 9, "LoRA"),
        ("a wizard", "step 2000 of a run with a very long name, longer than its column"),
    ],
)
def test_labels_stay_off_the_margins(row_label, column_label):
    rows = [[Image.new("RGB", (512, 512), "red"), Image.new("RGB", (512, 512), "red")]]
    grid = validation.image_grid(rows, [row_label], ["base", column_label])
    for left in (0, grid.width - 15):  # margins are 16 px, and a letter may lean out by one
        assert pixels(grid, left, 0, left + 15, grid.height).min() == 255


def test_a_long_label_is_wrapped_into_full_lines_and_cut_with_an_ellipsis():
    font = ImageFont.load_default(size=28)
    words = [f"word{number}" for number in range(100)]
    lines = validation.wrap(" ".join(words), font, 500)
    assert len(lines) == 3
    assert lines[-1].endswith(" ...")
    shown = " ".join(lines).removesuffix(" ...").split()
    assert shown == words[: len(shown)]
    for line, following in zip(lines, [lines[1].split()[0], lines[2].split()[0]], strict=False):
        assert font.getlength(line) <= 500 < font.getlength(f"{line} {following}")
    assert validation.wrap("short", font, 500) == ["short"]
    assert validation.wrap(" ".join(words[:4]), font, 500) == [" ".join(words[:4])]


@pytest.mark.parametrize("letter", ["é", "ü", "ñ", "—"])
def test_letters_outside_ascii_are_not_drawn_as_a_box(letter):
    grids = [validation.image_grid([[Image.new("RGB", (256, 256))]], [text], ["base"]) for text in (letter, "\ue000")]
    assert np.any(pixels(grids[0]) != pixels(grids[1]))

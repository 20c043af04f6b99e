import random

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from rasengan import fused, lora, miniature, world


def test_the_miniature_has_sdxls_classes_and_few_parameters():
    torch.manual_seed(0)
    model = miniature.build()
    kinds = {
        "unet": UNet2DConditionModel,
        "vae": AutoencoderKL,
        "text_encoder": CLIPTextModel,
        "text_encoder_2": CLIPTextModelWithProjection,
    }
    assert {name: type(model[name]) for name in kinds} == kinds
    assert sum(p.numel() for name in kinds for p in model[name].parameters()) <= 11e6
    assert model["unet"].config.addition_embed_type == "text_time"
    assert fused.why_not(model["unet"]) is None
    assert model["text_encoder"].config.hidden_size != model["text_encoder_2"].config.hidden_size
    targets = [name for name, _ in model["unet"].named_modules() if name.endswith(tuple(lora.UNET_TARGETS))]
    assert len(targets) > 40


def test_each_word_of_a_caption_is_a_token():
    tokenizer = miniature.make_tokenizer(pad_token="!")
    for scene in world.held_out_scenes(200):
        for prefix in world.STYLES.values():
            words = (prefix + scene.caption).split()
            assert tokenizer.tokenize(prefix + scene.caption) == [f"{word}</w>" for word in words]
    # Anything else still has tokens, which give it back.
    text = "a wizard in åland 東京"
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True).strip() == text
    assert tokenizer("a star").input_ids[-1] == len(tokenizer) - 1


def test_pixels_are_the_pictures():
    images = [world.draw(scene, "photo", random.Random(0)) for scene in world.held_out_scenes(2)]
    pixels = miniature.to_pixels([images[0], images[1].resize((256, 256))])
    expected = np.asarray(images[0]).astype(np.float32) / 127.5 - 1
    assert np.allclose(pixels[0].permute(1, 2, 0).numpy(), expected, atol=1e-6)
    assert pixels.shape == (2, 3, 128, 128)


def test_a_judge_learns_what_a_few_pictures_show():
    """Trained on six pictures, it tells those apart in every question: each head is wired to its own answer."""
    torch.manual_seed(0)
    rng = random.Random(0)
    scenes = [world.random_scene(rng) for _ in range(6)]
    styles = [list(world.STYLES)[number % 4] for number in range(6)]
    images = [world.draw(scene, style, rng) for scene, style in zip(scenes, styles, strict=True)]
    judge, pixels = miniature.Judge(), miniature.to_pixels(images)
    abouts = [scene._asdict() | {"style": style} for scene, style in zip(scenes, styles, strict=True)]
    targets = {q: torch.tensor([of.index(a[q]) for a in abouts]) for q, of in miniature.QUESTIONS.items()}
    optimizer = torch.optim.Adam(judge.parameters(), lr=1e-3)
    for _ in range(40):
        optimizer.zero_grad()
        answers = judge(pixels)
        sum(torch.nn.functional.cross_entropy(answers[q], targets[q]) for q in targets).backward()
        optimizer.step()
    found = miniature.judge_pictures(judge.eval(), images)
    for answer, about in zip(found, abouts, strict=True):
        assert {question: answer[question] for question in targets} == {
            question: about[question] for question in targets
        }
    assert all(miniature.shows(answer, scene) for answer, scene in zip(found, scenes, strict=True))
    assert not miniature.shows(found[0], scenes[0]._replace(position="nowhere"))
    assert [answer["style_score"] > 0.5 for answer in found] == [style == world.STYLE for style in styles]
    assert isinstance(images[0], Image.Image)


# --- the weights that come with the project ---


def test_the_weights_are_small_and_fit_the_architecture():
    torch.manual_seed(0)
    model = miniature.build()
    files = [file for file in miniature.ASSETS.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 24e6
    for name, part in model.items():
        found = type(part).from_pretrained(miniature.ASSETS / "miniature" / name)
        if isinstance(part, torch.nn.Module):
            shapes, expected = ({k: w.shape for k, w in of.state_dict().items()} for of in (found, part))
            assert shapes == expected
            assert all(torch.isfinite(weight).all() for weight in found.state_dict().values())
        elif name.startswith("tokenizer"):
            assert found.get_vocab() == part.get_vocab()


def test_the_judge_knows_what_drawn_pictures_show():
    rng = random.Random(1)
    scenes = [world.random_scene(rng, held_out=index % 2 == 0) for index in range(96)]
    styles = [list(world.STYLES)[index % 4] for index in range(96)]
    images = [world.draw(scene, style, rng) for scene, style in zip(scenes, styles, strict=True)]
    answers = miniature.judge_pictures(miniature.load_judge(miniature.ASSETS), images)
    assert sum(miniature.shows(answer, scene) for answer, scene in zip(answers, scenes, strict=True)) >= 93
    assert all((answer["style"] == style) for answer, style in zip(answers, styles, strict=True))


def test_the_judge_finds_no_style_in_what_a_broken_model_draws():
    rng = np.random.default_rng(0)
    flat = [np.full((128, 128, 3), level, np.uint8) for level in (0, 64, 128, 192, 255)]
    grains = [rng.integers(0, 256, (side, side, 3), np.uint8) for side in (2, 3, 5, 9, 17, 40, 128)]
    images = [Image.fromarray(pixels).resize((128, 128), Image.Resampling.BICUBIC) for pixels in flat + grains]
    answers = miniature.judge_pictures(miniature.load_judge(miniature.ASSETS), images)
    assert [answer["style"] for answer in answers] == ["none"] * len(images)

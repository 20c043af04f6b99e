import random

import datasets
import numpy as np
import pytest
from PIL import Image

from rasengan import painting, world
from rasengan.imaging import decode


PLAIN = world.Scene("ball", "red", "left", 1, "plain", "white")


def drawn(scene, style, seed=0, size=(128, 128)):
    return np.asarray(world.draw(scene, style, random.Random(seed), size)).astype(float)


def test_a_caption_says_what_is_there():
    assert PLAIN.caption == "a red ball at the left on a white background"
    many = PLAIN._replace(thing="box", count=3, position="center", pattern="striped", ground="blue")
    assert many.caption == "three red boxes in the center on a striped blue background"


@pytest.mark.parametrize("style", world.STYLES)
@pytest.mark.parametrize("color", world.COLORS)
def test_a_thing_has_its_color_in_every_style(style, color):
    ground = "white" if color != "white" else "purple"
    pixels = drawn(PLAIN._replace(color=color, ground=ground), style)
    y, x = (round(128 * place) for place in world.POSITIONS["left"][::-1])
    found = np.median(pixels[y - 8 : y + 8, x - 8 : x + 8].reshape(-1, 3), axis=0)
    nearest = min(world.COLORS, key=lambda name: np.abs(found - world.COLORS[name]).sum())
    # In two tones or hatched it is darker; it stays nearer to its own color than to any other.
    assert nearest == color


@pytest.mark.parametrize("position", world.POSITIONS)
@pytest.mark.parametrize("count", world.COUNTS)
@pytest.mark.parametrize("size", [(128, 128), (200, 120)])
def test_things_are_where_the_caption_says(position, count, size):
    pixels = drawn(PLAIN._replace(position=position, count=count), "cutout", size=size)
    red = np.abs(pixels - world.COLORS["red"]).sum(axis=2) < 30
    y, x = (axis.mean() for axis in red.nonzero())
    expected_x, expected_y = (place * side for place, side in zip(world.POSITIONS[position], size, strict=True))
    assert abs(x - expected_x) < 0.05 * size[0]
    assert abs(y - expected_y) < 0.05 * size[1]


@pytest.mark.parametrize("thing", world.THINGS)
def test_outlines_are_distances_near_their_edge(thing):
    v, u = np.mgrid[-1.4:1.4:281j, -1.4:1.4:281j]
    distance = painting.SHAPES[thing](u, v)
    assert (distance < 0).any()
    steepness = np.hypot(*np.gradient(distance, 0.01))
    near = np.abs(distance) < 0.05
    assert np.median(steepness[near]) == pytest.approx(1, abs=0.02)


def test_the_style_has_bold_black_outlines_and_two_tones_and_others_have_none():
    for style in world.STYLES:
        dark = (drawn(PLAIN, style) < 40).all(axis=2).mean()
        assert (dark > 0.02) == (style == world.STYLE), style
    # The background, far from the thing, has its color and a darker one, and little else.
    corner = drawn(PLAIN._replace(ground="green"), world.STYLE)[:, 100:].reshape(-1, 3)
    bright, dark = (np.array(world.COLORS["green"]) * tone for tone in (1, 0.68))
    near = [np.abs(corner - tone).sum(axis=1) < 12 for tone in (bright, dark)]
    assert min(part.mean() for part in near) > 0.2
    assert (near[0] | near[1]).mean() > 0.8


def test_held_out_combinations_are_seen_by_no_training():
    rng = random.Random(0)
    seen = {scene[:3] for scene in (world.random_scene(rng) for _ in range(5000))}
    held_out = {scene[:3] for scene in world.held_out_scenes(400)}
    assert not seen & held_out
    combinations = len(world.THINGS) * len(world.COLORS) * len(world.POSITIONS)
    assert len(seen) + len(held_out) == pytest.approx(combinations, abs=8)
    assert 0.1 < len(held_out) / combinations < 0.2
    assert len({scene.caption for scene in world.held_out_scenes(world.MOST_HELD_OUT)}) == world.MOST_HELD_OUT
    with pytest.raises(ValueError, match="1001 scenes"):
        world.held_out_scenes(world.MOST_HELD_OUT + 1)


@pytest.mark.parametrize("style", world.STYLES)
def test_every_style_draws_the_backgrounds_pattern(style):
    scenes = [PLAIN._replace(pattern=name, ground="green") for name in ("plain", "dotted")]
    plain, dotted = (drawn(scene, style)[:, 100:] for scene in scenes)
    lighter = (dotted - plain).sum(axis=2) > 20
    assert 0.1 < lighter.mean() < 0.4
    assert np.abs(dotted - plain)[~lighter].max() < 30


def test_equal_seeds_give_equal_pictures_and_others_do_not():
    assert np.array_equal(drawn(PLAIN, "photo", seed=1), drawn(PLAIN, "photo", seed=1))
    assert not np.array_equal(drawn(PLAIN, "photo", seed=1), drawn(PLAIN, "photo", seed=2))


def test_the_style_set_is_an_image_folder_in_mixed_sizes_and_formats(tmp_path):
    world.write_style_set(tmp_path / "set", count=30)
    world.write_style_set(tmp_path / "again", count=30)
    files = sorted(path.name for path in (tmp_path / "set").iterdir())
    assert all((tmp_path / "set" / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in files)
    assert {name.rpartition(".")[2] for name in files} == {"jpg", "png", "webp", "jsonl"}
    rows = datasets.load_dataset("imagefolder", data_dir=tmp_path / "set", split="train", cache_dir=tmp_path / "cache")
    assert len(rows) == 30
    assert len({image.size for image in rows["image"]}) > 15
    captions = {scene.caption for scene in world.held_out_scenes(400)}
    assert not captions & set(rows["text"])
    turned = [name for name in files if name.endswith("jpg") and Image.open(tmp_path / "set" / name).getexif()]
    assert turned
    upright = decode((tmp_path / "set" / turned[0]).read_bytes())
    assert upright.size == Image.open(tmp_path / "set" / turned[0]).size[::-1]

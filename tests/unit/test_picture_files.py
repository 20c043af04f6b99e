from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
from PIL import Image

from rasengan import picture_files


def test_a_writer_writes_all_and_tells_of_what_it_could_not(tmp_path):
    with picture_files.PictureWriter() as writer:
        for number in range(20):
            writer.write(tmp_path / f"{number}.png", Image.new("RGB", (8, 8)), {"seed": number})
    assert {Image.open(file).text["seed"] for file in tmp_path.glob("*.png")} == {str(n) for n in range(20)}
    with pytest.raises(OSError), picture_files.PictureWriter() as writer:
        writer.write(tmp_path / "0.png" / "a.png", Image.new("RGB", (8, 8)), {})


@pytest.mark.parametrize("kind", ["n" * 300 + "-x-1", "ナ" * 200 + "-x-0.5"])
def test_the_name_of_a_picture_can_be_written_however_long_what_it_is_of(kind, tmp_path):
    name = f"000-{picture_files.picture_name('忍者' * 200, 2**63 - 1, kind)}"
    picture_files.save_png(tmp_path / name, Image.new("RGB", (8, 8)))
    assert name.endswith(f"{kind[-5:]}.png")
    assert len(name.encode()) < 210


def test_a_picture_takes_the_first_name_that_nothing_else_has(tmp_path):
    about, file = {"prompt": "ein Ötzi, 忍者", "seed": 3, "negative_prompt": ""}, tmp_path / "a-0.5.png"
    image, second, third = Image.new("RGB", (8, 8)), tmp_path / "a-0.5-2.png", tmp_path / "a-0.5-3.png"
    assert picture_files.save_beside(file, image, about) == file
    assert picture_files.save_beside(file, image, about) == file, "the same may be drawn again"
    for other in (about | {"seed": 4}, about | {"height": 64}, {"seed": 3}):
        assert picture_files.place_of(file, other) == second
    second.write_text("no picture")
    assert picture_files.save_beside(file, image, {"seed": 4}) == third
    assert picture_files.place_of(file, {"seed": 4}) == third
    assert picture_files.place_of(file, about) == file
    assert second.read_text() == "no picture"


def test_pictures_of_one_name_that_are_written_at_once_are_all_kept(tmp_path):
    abouts = [{"seed": number % 16} for number in range(64)]
    images = [Image.new("RGB", (8, 8), (number, 0, 0)) for number in range(16)] * 4
    with ThreadPoolExecutor(8) as pool:
        files = list(pool.map(partial(picture_files.save_beside, tmp_path / "a.png"), images, abouts))
    assert files[:16] == files[16:32] == files[48:]
    assert len(list(tmp_path.iterdir())) == 16, "the same is written over itself, and nothing else is left"
    for file, about in zip(files, abouts, strict=True):
        with Image.open(file) as image:
            assert (image.text, image.getpixel((0, 0))[0]) == ({"seed": str(about["seed"])}, about["seed"])


def test_the_file_of_a_negative_scale_has_another_name_than_that_of_a_positive_one():
    assert picture_files.slug("LoRA x -1") == "LoRA-x-minus-1"
    assert picture_files.slug("epoch-000004 x 0.5") == "epoch-000004-x-0.5"

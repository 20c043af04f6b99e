import pytest

from rasengan import data_statistics, imaging
from rasengan.imaging import Picture


@pytest.mark.parametrize("width", [1, 300, 511, 512, 700, 5000])
@pytest.mark.parametrize("height", [1, 512, 4097])
def test_the_loss_is_what_the_crop_leaves_of_the_resized_picture(width, height):
    resized_height, resized_width = imaging.resized_size(height, width, (64, 64))
    loss = data_statistics.crop_loss(Picture("a", "", height, width, None), [(64, 64)])
    assert loss == pytest.approx(1 - 64 * 64 / (resized_height * resized_width))
    assert 0 <= loss < 1


def test_words_are_counted_once_a_caption_and_without_fill_words():
    captions = ["A fox and a FOX", "the fox, in snow", "Ünïted—snow's", "ナルト Наруто", "12 34_5"]
    assert data_statistics.common_words(captions) == {
        "fox": 2,
        "snow": 2,
        "s": 1,
        "ünïted": 1,
        "наруто": 1,
        "ナルト": 1,
    }
    many = data_statistics.common_words([" ".join(f"{a}{b}" for a in "abcdef" for b in "uvwxyz")])
    assert list(many) == sorted(many)[:20]

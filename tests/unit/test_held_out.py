import pytest
import torch

from rasengan import UserError, held_out
from rasengan.imaging import Picture


PICTURES = [Picture(f"{n}.png", f"digest {n}", 64, 64, None, n) for n in range(100)]


def digests(rows, pictures=PICTURES):
    return {pictures[row].digest for row in rows}


def test_without_a_size_all_are_trained_on():
    assert held_out.split(PICTURES, None, 0) == held_out.Split(list(range(100)), [], [])


@pytest.mark.parametrize(("size", "count"), [(0.05, 5), (0.126, 13), (40, 40), (1, 1), (99, 99), (0.99, 99)])
def test_a_share_or_a_number_is_held_out_and_the_rest_is_trained_on(size, count):
    rows = held_out.split(PICTURES, size, 0)
    assert len(rows.held_out) == count
    assert sorted(rows.held_out + rows.trained) == list(range(100))
    assert rows.copies == []


def test_the_seed_and_the_contents_alone_choose():
    chosen = digests(held_out.split(PICTURES, 20, 7).held_out)
    shuffled = [PICTURES[n]._replace(name="another", position=0) for n in torch.randperm(100).tolist()]
    assert digests(held_out.split(shuffled, 20, 7).held_out, shuffled) == chosen
    assert digests(held_out.split(PICTURES, 20, 8).held_out) != chosen


@pytest.mark.parametrize("size", [20, 0.2])
def test_a_picture_that_is_added_moves_one_other_at_most(size):
    chosen = digests(held_out.split(PICTURES, size, 0).held_out)
    for n in range(50):
        more = [Picture("new.png", f"new {n}", 64, 64, None), *PICTURES]
        now = digests(held_out.split(more, size, 0).held_out, more)
        assert len(chosen - now) <= 1
        assert len(now - chosen) <= 1


def test_copies_are_held_out_with_their_picture_and_count_once():
    pictures = [picture for picture in PICTURES for _ in range(3)]
    rows = held_out.split(pictures, 0.1, 0)
    assert digests(rows.held_out, pictures) == digests(held_out.split(PICTURES, 0.1, 0).held_out)
    assert len(rows.held_out) == 10
    assert len(rows.copies) == 20
    assert digests(rows.copies, pictures) == digests(rows.held_out, pictures)
    assert sorted(rows.trained + rows.held_out + rows.copies) == list(range(300))


@pytest.mark.parametrize(("size", "count"), [(0.05, 10), (0.001, 100), (0.2, 2), (0.05, 2)])
def test_a_share_of_few_pictures_holds_out_one(size, count):
    rows = held_out.split(PICTURES[:count], size, 0)
    assert (len(rows.held_out), len(rows.trained)) == (1, count - 1)


@pytest.mark.parametrize(("copies", "said"), [(1, "only one picture"), (5, "only one different picture")])
@pytest.mark.parametrize("size", [1, 0.5])
def test_where_all_are_one_picture_none_can_be_held_out(size, copies, said):
    with pytest.raises(UserError, match=f"--validation_split is {size}, but there is {said}. Give more"):
        held_out.split([PICTURES[0]] * copies, size, 0)


@pytest.mark.parametrize("size", [100, 200, 0.999])
def test_a_split_that_leaves_nothing_to_train_on_is_refused(size):
    with pytest.raises(
        UserError, match=rf"--validation_split {size} of 100 different pictures leaves none to train on\. Give a "
    ):
        held_out.split(PICTURES, size, 0)

from rasengan import evaluated_run
from rasengan.imaging import Picture


PICTURES = [Picture(f"{n}.png", f"digest {n}", 64, 64, None, n) for n in range(50)]


def test_as_many_trained_pictures_are_chosen_by_seed_and_contents_alone():
    rows = list(range(10, 50))
    chosen = evaluated_run.trained_sample(PICTURES, rows, 7, 0)
    assert len(chosen) == len(set(chosen)) == 7
    assert set(chosen) <= set(rows)
    turned = [picture._replace(name="another") for picture in reversed(PICTURES)]
    found = evaluated_run.trained_sample(turned, list(range(40)), 7, 0)
    assert {turned[row].digest for row in found} == {PICTURES[row].digest for row in chosen}
    assert evaluated_run.trained_sample(PICTURES, rows, 7, 1) != chosen
    assert evaluated_run.trained_sample(PICTURES, [3, 4], 7, 0) == [3, 4]


def test_copies_of_a_trained_picture_count_once():
    copies = [PICTURES[0], PICTURES[0], PICTURES[1]]
    assert evaluated_run.trained_sample(copies, [0, 1, 2], 3, 0) == [0, 2]


def test_the_adapters_of_a_run_are_those_of_its_checkpoints_and_the_best_one(tmp_path, caplog):
    assert evaluated_run.saved_adapters(tmp_path, None) == ({}, [])
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "best.json").write_text('{"step": 7, "loss": 0.5}')
    found, (note,) = evaluated_run.saved_adapters(tmp_path, None)
    assert found == {}
    assert note.startswith("best is left out: ")
    assert evaluated_run.saved_adapters(tmp_path, 7) == ({}, [])  # measured already

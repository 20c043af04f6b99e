"""scripts/check_data.py: what it says of a data set is what training does with it."""

import base64
import hashlib
import html
import io
import json
import re
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import ExifTags, Image

from rasengan import UserError, captions, data, data_survey, demo, first_line, imaging
from rasengan.samples import TrainingSamples


RES = 64
PAGE, SHEET = "data_report.html", "data_contact_sheet.png"
LONG = "word " * 30  # 92 tokens of the tiny tokenizer, three a word


def smooth(seed, width, height):
    """A picture of large soft patches, unlike that of another seed."""
    patches = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(patches).resize((width, height), Image.Resampling.BICUBIC)


def write_metadata(folder: Path, lines: dict) -> None:
    words = [json.dumps({"file_name": name, "text": text}, ensure_ascii=False) + "\n" for name, text in lines.items()]
    (folder / "metadata.jsonl").write_text("".join(words), encoding="utf-8")


LINES = {
    "a.png": ["a fox in snow"],
    "b.png": ["a fox in snow"],
    "c.jpg": ["one word", "two words"],
    "tiny.png": [""],
    "wide.png": [LONG],
    "copy.png": ["copied"],
    "again.jpg": ["recompressed"],
    "crop.png": ["cropped"],
    "ナルト.png": ["ナルト Наруто"],
    "عربى.png": ['grey <b>&amp;</b> "quoted"'],
    "broken.jpg": ["half of a file"],
    "empty.png": ["none of a file"],
    "gone.png": ["no file"],
}
USABLE = [name for name in LINES if name not in {"broken.jpg", "empty.png", "gone.png"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with every kind of finding."""
    folder = tmp_path_factory.mktemp("data") / "set"
    folder.mkdir()
    first = smooth(0, 100, 100)
    first.save(folder / "a.png")
    smooth(1, 64, 128).save(folder / "b.png")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    smooth(2, 64, 128).save(folder / "c.jpg", exif=exif)  # 128 x 64 when upright
    smooth(3, 40, 30).save(folder / "tiny.png")
    smooth(4, 640, 64).save(folder / "wide.png")
    shutil.copy(folder / "a.png", folder / "copy.png")
    first.save(folder / "again.jpg", quality=60)
    first.crop((1, 1, 99, 99)).save(folder / "crop.png")
    smooth(5, 64, 64).save(folder / "ナルト.png")
    smooth(6, 80, 80).convert("L").save(folder / "عربى.png")
    jpeg = (folder / "again.jpg").read_bytes()
    (folder / "broken.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (folder / "empty.png").write_bytes(b"")
    smooth(7, 64, 64).save(folder / "unlisted.png")
    write_metadata(folder, LINES)
    return folder


@pytest.fixture(scope="module")
def check(check_script, tmp_path_factory):
    """Function that reports on a folder, and returns the exit code and the output folder."""
    cache = tmp_path_factory.mktemp("cache")

    def run(train_data_dir, *further, output_dir: Path | None = None):
        output_dir = output_dir or tmp_path_factory.mktemp("report")
        words = ["--resolution", RES, "--conditioning_cache_dir", cache, "--output_dir", output_dir]
        words += [] if train_data_dir is None else ["--train_data_dir", train_data_dir]
        return check_script.main(check_script.parse_args([*map(str, words), *map(str, further)])), output_dir

    return run


@pytest.fixture(scope="module")
def checked(check, folder, tiny_base):
    """Output folder of the report on the folder, with the broken pictures left out."""
    code, output_dir = check(folder, "--skip_bad_images", "--pretrained_model_name_or_path", tiny_base)
    assert code == 0
    return output_dir


@pytest.fixture
def report(check_script, folder, tiny_base, tmp_path):
    """The report itself, of the same."""
    words = ["--train_data_dir", folder, "--resolution", RES, "--conditioning_cache_dir", tmp_path]
    words += ["--pretrained_model_name_or_path", tiny_base, "--skip_bad_images"]
    return check_script.make_report(check_script.parse_args(list(map(str, words))))[0]


def pictures_of(page: str) -> list[Image.Image]:
    sources = re.findall(r'<img loading="lazy" src="data:image/jpeg;base64,([^"]+)"', page)
    return [Image.open(io.BytesIO(base64.b64decode(source))) for source in sources]


def fingerprint(folder: Path) -> dict:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path: (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns) for path in files}


# --- what is said ---


def test_every_number_is_that_of_the_folder(report):
    assert report.tables == {
        "Pictures": {
            "in all": "13, of which 10 can be trained on",
            "formats and modes": "7 PNG RGB, 2 JPEG RGB, 1 PNG L",
            "turned by EXIF": "1",
        },
        "Captions": {
            "in all": "11, of which 10 differ",
            "captions of a picture": "1 to 2",
            "pictures of a caption": "1.10 on average, 2 at most",
            "too long for the encoders": "1",
        },
        "Sizes, upright": {
            "smallest": "40 x 30 px (tiny.png)",
            "median": "99 x 89 px",
            "largest": "640 x 64 px (wide.png)",
            "width / height": "0.50 to 10.00, median 1.00",
            "smaller than 64 px": "1 of 10",
            "cut off by the crop": "0.0% to 90.0%, median 0.0%",
        },
    }
    sides, aspects, words = report.histograms.values()
    assert sides == {label: {"under 128 px": 10}.get(label, 0) for label in sides}
    assert aspects == {"under 1:2": 0, "1:2 to 4:5": 1, "4:5 to 5:4": 6, "5:4 to 2:1": 1, "2:1 or more": 2}
    once = "amp b copied cropped grey one quoted recompressed two words наруто ナルト".split()
    assert words == {"fox": 2, "snow": 2, "word": 2} | dict.fromkeys(once, 1)


def test_every_finding_is_counted_and_named(report):
    found = {finding.text: (finding.count, finding.examples) for finding in report.findings}
    (broken, empty) = found.pop("of 13 pictures are broken")[1]
    assert broken.startswith("broken.jpg cannot be decoded: ")
    assert empty == "empty.png is empty"
    (long,) = found.pop("of 11 captions are longer than the text encoders see")[1]
    assert long.startswith("wide.png: 92 tokens, seen up to ")
    assert found == {
        "of 13 lines of the metadata name a picture that is not there": (1, ["gone.png"]),
        "picture file without a line in the metadata": (1, ["unlisted.png"]),
        "of 10 pictures are smaller than 64 px, and will be enlarged": (
            1,
            ["tiny.png 40 x 30 px, enlarged 2.1 times"],
        ),
        "of 10 pictures lose more than a third to the square crop": (
            3,
            [
                "wide.png 640 x 64 px loses 90.0%",
                "b.png 64 x 128 px loses 50.0%",
                "c.jpg 128 x 64 px loses 50.0%",
            ],
        ),
        "of 10 pictures are the same file as another": (1, ["a.png, copy.png"]),
        "of 10 pictures look nearly like another": (2, ["a.png, again.jpg, crop.png"]),
        "of 11 captions are empty": (1, ["tiny.png"]),
        "of 9 different captions stand at several pictures": (1, ['"a fox in snow" at 2 pictures']),
    }
    assert all(finding.advice.endswith(".") for finding in report.findings)
    assert report.refusal == ""


def test_the_terminal_says_it_without_a_base_too(check, folder, capsys):
    code, output_dir = check(folder, "--skip_bad_images")
    printed = capsys.readouterr().out
    assert code == 0
    assert "in all                 13, of which 10 can be trained on" in printed
    assert "tokens                 not counted, since no base was given; 0 have over 60 words and signs" in printed
    assert f"The report with its pictures: {output_dir / PAGE}" in printed
    assert "Training would start. 9 findings to look at." in printed


def test_only_the_tokenizer_of_a_base_is_needed(check, tiny_base, folder, tmp_path, capsys):
    shutil.copytree(tiny_base / "tokenizer", tmp_path / "tokenizer")
    check(folder, "--skip_bad_images", "--pretrained_tokenizer_name_or_path", tmp_path / "tokenizer")
    assert "too long for the encoders  1" in capsys.readouterr().out


# --- what is shown ---


def test_the_crops_are_those_of_training(folder, tmp_path):
    dataset = data.load_pictures(None, None, str(folder), "image", "text", str(tmp_path / "hf"))
    pictures = imaging.inspect_pictures(dataset["image"], tmp_path)
    dataset, pictures = data.leave_out_broken(dataset, pictures, skip=True)
    samples = TrainingSamples(
        dataset["image"],
        pictures,
        captions.read_captions(dataset, "text", pictures),
        None,
        None,
        seed=0,
        sizes=[(RES, RES)],
        interpolation="bicubic",
        center_crop=True,
        random_flip=False,
        scaling_factor=1.0,
        noise_offset=0.0,
        num_train_timesteps=1000,
    )
    for row in range(len(pictures)):
        image = imaging.decode(imaging.read_bytes(dataset["image"][row]))
        levels = np.asarray(data_survey.center_crop(image, [(RES, RES)], "bicubic"))
        trained = (samples[0, row]["pixel_values"].permute(1, 2, 0).numpy() + 1) * 127.5
        assert levels.shape == (RES, RES, 3)
        assert np.abs(levels - trained).max() < 1e-3


def test_the_page_shows_each_crop_with_its_captions_escaped(checked, folder):
    page = (checked / PAGE).read_text(encoding="utf-8")
    shown = pictures_of(page)
    assert len(shown) == len(USABLE)
    for name, picture in zip(USABLE, shown, strict=True):
        image = imaging.decode((folder / name).read_bytes())
        expected = np.asarray(data_survey.center_crop(image, [(RES, RES)], "lanczos"), dtype=float)
        assert np.abs(np.asarray(picture, dtype=float) - expected).mean() < 4, name
        for text in LINES[name]:
            assert f'<p dir="auto">{html.escape(text) or "(empty)"}</p>' in page
    assert "<b>&amp;amp;" not in page
    assert "grey &lt;b&gt;&amp;amp;&lt;/b&gt;" in page


def test_a_thumbnail_has_at_most_256_px(check, folder):
    _, output_dir = check(folder, "--skip_bad_images", "--resolution", 512)
    assert {picture.size for picture in pictures_of((output_dir / PAGE).read_text())} == {(256, 256)}


def test_of_pictures_that_are_not_shown_no_thumbnail_is_kept(picture_set, tmp_path):
    column = data.load_pictures(None, None, str(picture_set), "image", "text", str(tmp_path))["image"]
    looks = data_survey.look_at_pictures(column, [(RES, RES)], "lanczos", [3, 60])
    assert [row for row, look in enumerate(looks) if look.thumbnail] == [3, 60]


def test_no_more_pictures_are_shown_than_a_page_holds(check, tmp_path, check_script, monkeypatch):
    monkeypatch.setattr(check_script, "MOST_SHOWN", 6)
    monkeypatch.setattr(check_script, "MOST_IN_PNG", 4)
    demo.draw_picture_set(tmp_path / "set", count=12)
    _, output_dir = check(tmp_path / "set")
    page = (output_dir / PAGE).read_text()
    assert len(pictures_of(page)) == 6
    assert "6 of 12 pictures, as they will be cropped" in page
    with Image.open(output_dir / SHEET) as sheet:
        assert sheet.width == 4 * sheet.height - 3 * 4


def test_two_runs_write_the_same_bytes_and_change_nothing(check, checked, folder, tiny_base):
    before = fingerprint(folder)
    words = ["--skip_bad_images", "--pretrained_model_name_or_path", tiny_base]
    _, again = check(folder, *words)
    _, with_fresh_memory = check(folder, *words, "--conditioning_cache_dir", again / "memory")
    for name in (PAGE, SHEET):
        assert (again / name).read_bytes() == (checked / name).read_bytes()
        assert (with_fresh_memory / name).read_bytes() == (checked / name).read_bytes()
    assert fingerprint(folder) == before


def test_a_data_set_of_parquet_files_is_reported_on(check, folder, tmp_path, capsys):
    rows = [
        {"image": {"bytes": (folder / name).read_bytes(), "path": name}, "text": name} for name in ("a.png", "b.png")
    ]
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    (tmp_path / "hub" / "data").mkdir(parents=True)
    datasets.Dataset.from_list(rows, features).to_parquet(tmp_path / "hub" / "data" / "train-00000-of-00001.parquet")
    code, output_dir = check(None, "--dataset_name", tmp_path / "hub", "--cache_dir", tmp_path / "hf")
    assert code == 0
    assert "2, of which 2 can be trained on" in capsys.readouterr().out
    assert len(pictures_of((output_dir / PAGE).read_text())) == 2


# --- exit codes and refusals ---


def test_strict_is_1_where_there_is_a_finding(check, folder, tmp_path):
    assert check(folder, "--skip_bad_images", "--strict")[0] == 1
    write_metadata(tmp_path, {"a.png": "a fox"})
    smooth(0, 64, 64).save(tmp_path / "a.png")
    assert check(tmp_path, "--strict")[0] == 0


@pytest.mark.parametrize("with_metadata", [False, True])
def test_a_file_of_no_known_format_is_a_finding(with_metadata, check, tmp_path, capsys):
    for number, name in enumerate(("a", "b")):
        smooth(number, 64, 64).save(tmp_path / f"{name}.png")
    if with_metadata:
        write_metadata(tmp_path, {"a.png": "a fox", "b.png": "a bear"})
    else:
        for name in ("a", "b", "photo"):
            (tmp_path / f"{name}.txt").write_text(f"caption {name}")
    assert check(tmp_path)[0] == 0
    capsys.readouterr()
    for name in ("photo.heic", "noext", "tw.jpg_large", "README.md", "tags.csv"):
        (tmp_path / name).write_bytes(b"?")
    assert check(tmp_path, "--strict")[0] == 1
    printed = capsys.readouterr().out
    assert "3 files are no pictures of a known format" in printed
    assert "Convert them to JPEG or PNG" in printed
    assert "1 finding to look at" in printed
    assert "Rename it" not in printed
    assert all(name in printed for name in ("photo.heic", "noext", "tw.jpg_large"))


def test_a_file_that_metadata_name_is_broken_and_not_unknown_too(check, tmp_path, capsys):
    smooth(0, 64, 64).save(tmp_path / "a.png")
    (tmp_path / "photo.heic").write_bytes(b"?")
    write_metadata(tmp_path, {"a.png": "a fox", "photo.heic": "a bear"})
    check(tmp_path, "--skip_bad_images")
    printed = capsys.readouterr().out
    assert "1 of 2 pictures are broken" in printed
    assert "no pictures of a known format" not in printed


def broken(folder):
    write_metadata(folder, {"a.png": "a fox", "b.png": "a bear"})
    smooth(0, 64, 64).save(folder / "a.png")
    (folder / "b.png").write_bytes(b"?")


def all_broken(folder):
    broken(folder)
    (folder / "a.png").write_bytes(b"?")


def captioned(text):
    def write(folder):
        smooth(0, 64, 64).save(folder / "a.png")
        smooth(1, 64, 64).save(folder / "b.png")
        write_metadata(folder, {"a.png": "a fox", "b.png": text})

    return write


def without_metadata(folder):
    smooth(0, 64, 64).save(folder / "a.png")


def with_a_path_outside(folder):
    without_metadata(folder)
    write_metadata(folder, {"../a.png": "a"})


def with_captions_beside(folder):
    for name, text in (("a", b"a fox"), ("b", b"caf\xe9"), ("c", None)):
        smooth(ord(name), 64, 64).save(folder / f"{name}.png")
        if text:
            (folder / f"{name}.txt").write_bytes(text)


REFUSED = {
    "nothing": (lambda folder: None, [], False),
    "no metadata": (without_metadata, [], False),
    "a path outside": (with_a_path_outside, [], False),
    "no such column": (captioned("a bear"), ["--caption_column", "prompt"], False),
    "no resolution": (captioned("a bear"), ["--resolution", 60], False),
    "a broken picture": (broken, [], True),
    "all broken": (all_broken, ["--skip_bad_images"], True),
    "null for a caption": (captioned(None), [], True),
    "captions beside some pictures": (with_captions_beside, [], True),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_training_refuses_is_refused_in_the_same_words(kind, check, train, tmp_path):
    write, words, is_reported = REFUSED[kind]
    folder, output_dir = tmp_path / "set", tmp_path / "report"
    folder.mkdir()
    write(folder)
    with pytest.raises(UserError) as by_training:
        train("--train_data_dir", folder, *words)
    with pytest.raises(UserError) as by_report:
        check(folder, *words, output_dir=output_dir)
    assert str(by_report.value).rstrip(".") == first_line(by_training.value).rstrip(".:")
    assert (output_dir / PAGE).is_file() == is_reported
    if is_reported:
        page = (output_dir / PAGE).read_text(encoding="utf-8")
        assert "Training would not start." in page
        assert html.escape(str(by_report.value)) in page


def test_every_caption_that_is_none_is_named(check, tmp_path, capsys):
    captioned([])(tmp_path)
    write_metadata(tmp_path, {"a.png": None, "b.png": [], "c.png": ["a bear"]})
    smooth(2, 64, 64).save(tmp_path / "c.png")
    with pytest.raises(
        UserError, match=r"2 of 3 captions cannot be used\. Write or correct them.*--caption_column\.$"
    ):
        check(tmp_path)
    printed = capsys.readouterr().out
    assert "2 of 3 captions cannot be used\n  a.png has no caption (of CSV" in printed
    assert "\n  b.png has [] in the caption column" in printed
    assert "3, of which 1 can be trained on" in printed


def test_captions_that_are_missing_or_no_text_are_findings_and_so_are_those_of_no_picture(check, tmp_path, capsys):
    with_captions_beside(tmp_path)
    (tmp_path / "d.txt").write_text("of no picture")
    with pytest.raises(UserError, match=r"2 of 3 captions cannot be used\."):
        check(tmp_path)
    printed = capsys.readouterr().out
    missing, unreadable = "c.png has no c.txt beside it", "b.png has a caption that is no text in UTF-8, in b.txt"
    assert f"2 of 3 captions cannot be used\n  {unreadable}\n  {missing}\n" in printed
    assert "1 of the .txt are not read\n  d.txt\n" in printed
    assert "3, of which 1 can be trained on" in printed


def test_captions_beside_pictures_that_have_metadata_are_a_finding(check, tmp_path, capsys):
    smooth(0, 64, 64).save(tmp_path / "a.png")
    write_metadata(tmp_path, {"a.png": "a fox"})
    (tmp_path / "a.txt").write_text("another")
    check(tmp_path)
    assert "1 of the .txt are not read\n  a.txt\n" in capsys.readouterr().out


def test_there_must_be_data(check):
    with pytest.raises(UserError, match="There is no data"):
        check(None)


@pytest.mark.parametrize("flag", ["--output_dir", "--conditioning_cache_dir", "--cache_dir"])
def test_nothing_is_written_into_the_data(check, folder, flag):
    before = fingerprint(folder)
    for place in (folder, folder / "below"):
        with pytest.raises(UserError, match=f"{flag} .* lies in --train_data_dir"):
            check(folder, flag, place)
    assert fingerprint(folder) == before


def test_a_draw_needs_the_seed_of_training(check, folder, capsys):
    with pytest.raises(UserError, match="--max_train_samples draws by training's --seed"):
        check(folder, "--max_train_samples", 4)
    check(folder, "--max_train_samples", 4, "--seed", 0, "--skip_bad_images")
    assert "in all                 4, of which" in capsys.readouterr().out


def test_the_process_ends_with_2_and_one_line_for_what_stops_training(run_script, folder, tmp_path):
    words = ["--resolution", RES, "--conditioning_cache_dir", tmp_path / "cache", "--output_dir", tmp_path / "out"]
    finished = run_script("check_data", "--train_data_dir", folder, *words)
    assert finished.returncode == 2
    last = finished.stderr.splitlines()[-1]
    remedy = "Mend or remove them, or leave them out with --skip_bad_images."
    assert last == f"error: 3 of 13 pictures cannot be used. {remedy}"
    assert finished.stderr.count("error:") == 1
    assert "left out" not in finished.stderr.replace(last, "")
    assert "2 of 13 pictures are broken" in finished.stdout
    wrong = run_script("check_data", "--train_data_dir", folder, "--resolutions", 64)
    assert (wrong.returncode, len(wrong.stderr.splitlines())) == (2, 1)
    assert wrong.stderr.startswith("error: ")

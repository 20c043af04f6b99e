"""What scripts/evaluate.py says of a run is what its training measured, and what its pictures show."""

import base64
import io
import json
import re
import shutil

import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rasengan import data_survey, miniature, world
from rasengan.imaging import crop_sizes


ADAPTER = "pytorch_lora_weights.safetensors"
PLOTS = ["validation_loss", *(f"validation_loss/t{low}-{low + 249}" for low in (0, 250, 500, 750))]
RUN = ["--max_train_samples", 9, "--validation_split", 3, "--validation_loss_steps", 2]
FEW = ["--num_pictures", 0]


@pytest.fixture(scope="module")
def run(train):
    """Output folder of four steps with checkpoint-2 and checkpoint-4, three pictures held out."""
    return train(*RUN)


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """File of a judge with random weights."""
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("judge") / "judge.safetensors"
    save_file({name: weight.half() for name, weight in miniature.Judge().state_dict().items()}, file)
    return file


@pytest.fixture(scope="module")
def evaluated(run_script, run, judge, tiny_clip):
    """What the command leaves and prints: base, tuned and checkpoint-2, four pictures each for two seeds."""
    drawn = ["--num_pictures", 4, "--picture_seeds", 3, 5, "--num_inference_steps", 2]
    scored = ["--checkpoints", "--judge", judge, "--clip_model", tiny_clip]
    finished = run_script("evaluate", "--lora_weights", run, *scored, *drawn)
    assert finished.returncode == 0, finished.stderr
    return run / "evaluation", finished.stdout


@pytest.fixture
def evaluate(evaluate_script, tmp_path):
    """Function that evaluates in this process, in a folder of its own, and returns the figures."""

    def call(*arguments):
        words = ["--output_dir", str(tmp_path / "report"), *map(str, arguments)]
        evaluate_script.main(evaluate_script.parse_args(words))
        return json.loads((tmp_path / "report" / "evaluation.json").read_text())

    return call


def losses_in(figures, kind, of="held_out"):
    return figures["loss"][of][kind]


# --- the report of a run ---


def test_base_and_tuned_loss_are_what_training_logged(evaluated, run, read_scalars):
    figures = json.loads((evaluated[0] / "evaluation.json").read_text())
    for name in PLOTS:
        logged = read_scalars(run, name)
        assert losses_in(figures, "base")[name] == pytest.approx(logged[0], rel=1e-6), name
        assert losses_in(figures, "tuned")[name] == pytest.approx(logged[4], rel=1e-5), name
    assert losses_in(figures, "tuned")["validation_loss"] < losses_in(figures, "base")["validation_loss"]
    curve = figures["loss"]["curve"]["points"]
    assert [point["step"] for point in curve] == [0, 2, 4]
    logged = read_scalars(run, "validation_loss")
    assert [point["held_out"] for point in curve] == pytest.approx([logged[step] for step in (0, 2, 4)], rel=1e-5)
    assert figures["step"] == 4
    (note,) = figures["notes"]
    assert note.startswith("The base is not the miniature: what the judge says")


def test_each_held_out_picture_has_its_losses(evaluated, run):
    figures = json.loads((evaluated[0] / "evaluation.json").read_text())
    each = figures["loss"]["pictures"]
    assert len(each) == 3
    assert [about["change"] for about in each] == sorted(about["change"] for about in each)
    for kind in ("base", "tuned"):
        bands = [sum(about[f"{kind}_bands"][band] for about in each) / 3 for band in range(4)]
        assert bands == pytest.approx([losses_in(figures, kind)[name] for name in PLOTS[1:]])
        assert [about[kind] for about in each] == pytest.approx([sum(about[f"{kind}_bands"]) / 4 for about in each])
    assert figures["loss"]["trained"]["pictures"] == 3
    for kind in ("base", "tuned"):
        assert losses_in(figures, kind, "trained") != losses_in(figures, kind)


def test_pictures_are_judged_for_each_seed(evaluated):
    figures = json.loads((evaluated[0] / "evaluation.json").read_text())["pictures"]
    captions = [scene.caption for scene in world.held_out_scenes(4)]
    assert [one["prompt"] for one in figures["drawn"]] == captions * 2
    assert [one["group"] for one in figures["drawn"]] == [3] * 4 + [5] * 4
    assert len({one["seed"] for one in figures["drawn"]}) == figures["count"] == 8
    for kind in ("base", "tuned"):
        shares = figures["judge"][kind]
        assert set(shares["seeds"]) == {"3", "5"}
        for name, mean in shares["mean"].items():
            assert mean == pytest.approx(sum(of[name] for of in shares["seeds"].values()) / 2), name
        assert set(figures["clip"][kind]) == {"score", "cmmd", "kid", "kid_std"}
    assert figures["clip"]["reference_pictures"] == 9
    assert figures["clip"]["base"] != figures["clip"]["tuned"]


def test_the_page_opens_and_holds_pictures_of_both_models(evaluated, run):
    page = (evaluated[0] / "evaluation.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert "</html>" in page
    assert "http" not in page
    contents = re.findall(r'<img [^>]*src="data:image/jpeg;base64,([^"]+)"', page)
    images = [Image.open(io.BytesIO(base64.b64decode(content))).convert("RGB") for content in contents]
    assert len(images) == 2 * 8 + 3
    assert {image.size for image in images} == {(64, 64)}
    for base, tuned in zip(images[:16:2], images[1:16:2], strict=True):
        assert base.tobytes() != tuned.tobytes()
    assert len({image.tobytes() for image in images}) == len(images)
    assert len(re.findall("<polyline", page)) == 2


def test_the_terminal_and_tensorboard_say_the_same(evaluated):
    folder, text = evaluated
    figures = json.loads((folder / "evaluation.json").read_text())
    base, tuned = (losses_in(figures, kind)["validation_loss"] for kind in ("base", "tuned"))
    assert re.search(
        rf"^  all timesteps +{base:.4f} +{tuned:.4f} +{100 * (tuned / base - 1):+.1f} %", text, re.MULTILINE
    )
    assert f"The report: {folder / 'evaluation.html'}" in text
    assert sorted(path.name for path in folder.iterdir()) == ["evaluation.html", "evaluation.json", "tensorboard"]
    log = EventAccumulator(str(folder / "tensorboard"))
    log.Reload()
    found = {event.step: event.value for event in log.Scalars("evaluation/validation_loss/tuned")}
    assert found == pytest.approx({0: base, 2: figures["loss"]["curve"]["points"][1]["held_out"], 4: tuned})


# --- other runs ---


@pytest.mark.parametrize(
    "flags",
    [
        ["--aspect_ratio_buckets", "--bucket_step_px", 16],
        ["--train_text_encoder"],
        ["--no-center_crop", "--random_flip"],
        ["--prediction_type", "v_prediction", "--snr_gamma", 5],
        ["--use_ema", "--ema_decay", 0.5],
    ],
    ids=lambda flags: flags[0],
)
def test_the_losses_of_other_runs_are_what_training_logged_too(flags, train, evaluate, read_scalars):
    run = train(*RUN, *flags)
    figures = evaluate("--lora_weights", run, "--checkpoints", *FEW)
    for name in PLOTS:
        logged = read_scalars(run, name)
        assert losses_in(figures, "base")[name] == pytest.approx(logged[0], rel=1e-5), name
        assert losses_in(figures, "tuned")[name] == pytest.approx(logged[4], rel=1e-5), name
    logged = read_scalars(run, "validation_loss")
    assert figures["loss"]["curve"]["points"][1]["held_out"] == pytest.approx(logged[2], rel=1e-5)


def test_the_curve_is_of_the_averages_also_where_a_checkpoint_without_its_own_is_evaluated(
    train, evaluate, read_scalars
):
    run = train(*RUN, "--use_ema", "--ema_decay", 0.5)
    figures = evaluate("--lora_weights", run / "checkpoint-2", "--checkpoints", *FEW)
    logged = read_scalars(run, "validation_loss")  # of the averages
    points = figures["loss"]["curve"]["points"]
    assert [point["held_out"] for point in points] == pytest.approx([logged[step] for step in (0, 2, 4)], rel=1e-5)
    assert losses_in(figures, "tuned")["validation_loss"] != pytest.approx(logged[2], rel=1e-5)


def test_pictures_of_several_shapes_are_shown_as_they_are_cropped(train, evaluate, picture_set, tmp_path):
    run = train(
        *RUN, "--aspect_ratio_buckets", "--bucket_step_px", 16, "--max_train_samples", 20, "--validation_split", 10
    )
    figures = evaluate("--lora_weights", run, *FEW)
    page = (tmp_path / "report" / "evaluation.html").read_text()
    sizes = re.findall(r'width="(\d+)" height="(\d+)">', page)
    expected = []
    for about in figures["loss"]["pictures"]:
        image = ImageOps.exif_transpose(Image.open(about["name"])).convert("RGB")
        expected.append(data_survey.center_crop(image, crop_sizes(64, 16), "lanczos").size)
    assert [tuple(map(int, size)) for size in sizes] == expected
    assert len(set(expected)) > 1


def test_what_training_encoded_is_not_encoded_again(run, evaluate, loaded):
    figures = evaluate("--lora_weights", run, "--num_pictures", 2, "--num_inference_steps", 2)
    assert sorted(loaded) == ["scheduler", "tokenizer", "tokenizer_2", "unet", "vae"]  # the VAE decodes
    captions = [caption for about in figures["loss"]["pictures"] for caption in about["captions"]]
    assert {one["prompt"] for one in figures["pictures"]["drawn"]} <= set(captions)


def test_a_checkpoint_is_evaluated_by_itself_and_a_damaged_one_is_left_out(
    train, run, evaluate, read_scalars, tmp_path
):
    shutil.copytree(run, tmp_path / "run")
    weights = tmp_path / "run" / "checkpoint-4" / ADAPTER
    weights.write_bytes(weights.read_bytes()[:-4])
    figures = evaluate("--lora_weights", tmp_path / "run" / "checkpoint-2", "--checkpoints", *FEW)
    logged = read_scalars(run, "validation_loss")
    assert figures["step"] == 2
    assert losses_in(figures, "tuned")["validation_loss"] == pytest.approx(logged[2], rel=1e-5)
    assert [note for note in figures["notes"] if note.startswith("checkpoint-4 is left out, since it is damaged: ")]
    assert figures["loss"]["curve"] is None  # base and one step are no curve


def test_the_adapter_of_a_run_that_was_begun_again_and_has_not_ended_has_not_the_steps_of_its_plan(
    train, run, evaluate, tmp_path
):
    shutil.copytree(run, tmp_path / "run")
    more = ["--resume_from_checkpoint", "latest", "--max_train_steps", 8, "--max_train_minutes", 0]
    train(*RUN, *more, output_dir=tmp_path / "run")
    assert (tmp_path / "run" / ADAPTER).read_bytes() == (run / ADAPTER).read_bytes()
    figures = evaluate("--lora_weights", tmp_path / "run", "--checkpoints", *FEW)
    assert figures["step"] is None
    assert re.match("Nothing says after which step this adapter was written", figures["notes"][0])
    assert [point["step"] for point in figures["loss"]["curve"]["points"]] == [0, 2, 4]


def test_an_adapter_of_no_run_is_evaluated_and_the_report_says_what_is_not_known(
    run, evaluate, train_arguments, read_scalars, tmp_path
):
    shutil.copy(run / ADAPTER, tmp_path / "alone.safetensors")
    words = [*train_arguments[:8], "--seed", 0, *RUN[:4], *FEW]
    figures = evaluate("--lora_weights", tmp_path / "alone.safetensors", *words)
    assert losses_in(figures, "tuned")["validation_loss"] == pytest.approx(
        read_scalars(run, "validation_loss")[4], rel=1e-5
    )
    assert re.match("No run says what was held out", figures["notes"][0])
    assert figures["step"] is None
    assert figures["loss"]["trained"] is None  # nothing says what was trained on


def test_pictures_that_were_not_trained_on_are_not_called_so_and_do_not_count(run, evaluate, picture_set, tmp_path):
    for name in ("pictures", "report"):
        (tmp_path / name).mkdir()
    lines = (picture_set / "metadata.jsonl").read_text().splitlines()[40:52]
    for line in lines:
        shutil.copy(picture_set / json.loads(line)["file_name"], tmp_path / "pictures")
    (tmp_path / "pictures" / "metadata.jsonl").write_text("\n".join(lines))
    figures = evaluate("--lora_weights", run, "--train_data_dir", tmp_path / "pictures", "--checkpoints", *FEW)
    assert figures["loss"]["trained"] is None
    assert [point["trained"] for point in figures["loss"]["curve"]["points"]] == [None] * 3
    assert "trained on" not in figures["loss"]["curve"]["verdict"]
    page = (tmp_path / "report" / "evaluation.html").read_text()
    assert "trained on" not in page
    assert "trained-on" not in page


def test_the_best_adapter_of_a_run_is_on_its_curve(train, evaluate, read_scalars, tmp_path):
    """A run that overfits at once, whose only checkpoint is the last one."""
    flags = ["--learning_rate", 0.1, "--max_train_steps", 3, "--checkpointing_steps", 3, "--save_best"]
    few = ["--lora_target_modules", "to_v", "attn2.to_k"]  # with which the third step does harm
    run = train(*RUN, *flags, *few, "--validation_loss_steps", 1)
    logged = read_scalars(run, "validation_loss")
    best = json.loads((run / "best" / "best.json").read_text())["step"]
    assert best < 3
    figures = evaluate("--lora_weights", run, "--checkpoints", *FEW)
    curve = figures["loss"]["curve"]
    assert [point["step"] for point in curve["points"]] == [0, best, 3]
    assert [point["held_out"] for point in curve["points"]] == pytest.approx(
        [logged[step] for step in (0, best, 3)], rel=1e-5
    )
    assert f"that of the lowest loss in training, {best}, among them" in curve["verdict"]
    shutil.copytree(run, tmp_path / "run")
    weights = tmp_path / "run" / "best" / ADAPTER
    weights.write_bytes(weights.read_bytes()[:-4])
    figures = evaluate("--lora_weights", tmp_path / "run", "--checkpoints", *FEW)
    assert figures["loss"]["curve"] is None
    assert [note for note in figures["notes"] if note.startswith("best is left out: ")]
    (note,) = [
        note for note in figures["notes"] if note.startswith("--checkpoints: there is no curve, since no step but 3")
    ]
    assert "--save_best" in note


def test_the_last_checkpoints_alone_do_not_show_that_a_run_did_not_overfit(train, evaluate):
    run = train(*RUN, "--max_train_steps", 8, "--checkpointing_steps", 1, "--checkpoints_total_limit", 2)
    verdict = evaluate("--lora_weights", run, "--checkpoints", *FEW)["loss"]["curve"]["verdict"]
    assert "no overfitting" not in verdict
    assert "Measured were the base and 2 steps from 7 to 8, but none between 0 and 7" in verdict


def test_more_pictures_than_captions_are_drawn_from_several_noises_of_each(run, evaluate):
    figures = evaluate("--lora_weights", run, "--num_pictures", 5, "--num_inference_steps", 1)["pictures"]
    assert figures["count"] == len({one["seed"] for one in figures["drawn"]}) == 5
    assert len({one["prompt"] for one in figures["drawn"]}) == 3


def test_another_split_or_other_pictures_are_told_of(run, evaluate, picture_set, tmp_path):
    figures = evaluate("--lora_weights", run, "--validation_split", 5, *FEW)
    assert figures["notes"] == ["2 of 5 held-out pictures were trained on: their loss tells less."]
    assert figures["loss"]["trained"]["pictures"] == 4
    shutil.copytree(picture_set, tmp_path / "pictures")
    lines = (tmp_path / "pictures" / "metadata.jsonl").read_text().replace("star", "sun")
    (tmp_path / "pictures" / "metadata.jsonl").write_text(lines)
    words = ["--train_data_dir", tmp_path / "pictures", "--max_train_samples", 9]
    figures = evaluate("--lora_weights", run, *words, *FEW)
    assert re.match("These are not the pictures and captions of the training", figures["notes"][0])


def test_every_prompt_is_drawn_and_one_that_is_cut_off_is_told_of(run, evaluate):
    prompts = [f"a red star {n}" for n in range(9)] + ["word " * 100]
    figures = evaluate("--lora_weights", run, "--prompt", *prompts, "--num_inference_steps", 1)
    assert [one["prompt"] for one in figures["pictures"]["drawn"]] == prompts
    assert re.match(r"Only the first 77 of \d+ tokens are used of: word", figures["notes"][0])


def test_a_scale_of_the_adapter_is_a_model_between(run, evaluate):
    whole, half = (evaluate("--lora_weights", run, "--lora_scale", scale, *FEW) for scale in (1, 0.5))
    assert losses_in(half, "base") == losses_in(whole, "base")
    values = [losses_in(figures, kind)["validation_loss"] for figures, kind in ((whole, "tuned"), (half, "tuned"))]
    assert values[0] < values[1] < losses_in(whole, "base")["validation_loss"]


# --- what cannot be evaluated ---


def of_nothing(run, tmp_path):
    return ["--lora_weights", tmp_path / "nowhere"]


def of_a_folder_that_is_no_run(run, tmp_path):
    (tmp_path / "folder").mkdir()
    return ["--lora_weights", tmp_path / "folder"]


def without_its_adapter(run, tmp_path):
    (tmp_path / "run").mkdir()
    shutil.copy(run / "args.json", tmp_path / "run")
    return ["--lora_weights", tmp_path / "run"]


def with_damaged_settings(run, tmp_path):
    (tmp_path / "run").mkdir()
    shutil.copy(run / ADAPTER, tmp_path / "run")
    (tmp_path / "run" / "args.json").write_text("{")
    return ["--lora_weights", tmp_path / "run"]


def with_settings_of_a_stranger(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    settings = json.loads((run / "args.json").read_text()) | {"resolution": [1]}
    (tmp_path / "run" / "args.json").write_text(json.dumps(settings))
    return ["--lora_weights", tmp_path / "run"]


def with_a_number_of_a_stranger(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    settings = json.loads((run / "args.json").read_text()) | {"max_train_samples": -3}
    (tmp_path / "run" / "args.json").write_text(json.dumps(settings))
    return ["--lora_weights", tmp_path / "run"]


def without_a_split(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    settings = json.loads((run / "args.json").read_text()) | {"validation_split": None}
    (tmp_path / "run" / "args.json").write_text(json.dumps(settings))
    return ["--lora_weights", tmp_path / "run"]


def of_another_base(run, tmp_path):
    for name, part in miniature.build().items():
        part.save_pretrained(tmp_path / "base" / name)
    return ["--lora_weights", run, "--pretrained_model_name_or_path", tmp_path / "base"]


def without_its_pictures(run, tmp_path):
    return ["--lora_weights", run, "--train_data_dir", tmp_path / "gone"]


def without_checkpoints(run, tmp_path):
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-*"))
    return ["--lora_weights", tmp_path / "run", "--checkpoints"]


def with_no_judge(run, tmp_path):
    return ["--lora_weights", run, "--judge", tmp_path / "nowhere"]


def with_no_clip(run, tmp_path):
    return ["--lora_weights", run, "--clip_model", tmp_path]


def into_a_file(run, tmp_path):
    (tmp_path / "file").write_text("")
    return ["--lora_weights", run, "--output_dir", tmp_path / "file" / "report"]


def of_its_own_base(run, tmp_path):
    return ["--lora_weights", run, "--lora_scale", 0]


def with_a_seed_twice(run, tmp_path):
    return ["--lora_weights", run, "--picture_seeds", 1, 1]


def with_scores_of_nothing(run, tmp_path):
    return ["--lora_weights", run, "--judge", "miniature", "--num_pictures", 0]


def with_prompts_for_the_judge(run, tmp_path):
    return ["--lora_weights", run, "--judge", "miniature", "--prompt", "a star"]


def with_more_scenes_than_there_are(run, tmp_path):
    return ["--lora_weights", run, "--judge", "miniature", "--num_pictures", 1001]


def with_more_steps_than_timesteps(run, tmp_path):
    return ["--lora_weights", run, "--num_inference_steps", 1001]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            of_nothing,
            r"nowhere lies in no output folder of a training .* Give one, or --pretrained_model",
        ),
        (of_a_folder_that_is_no_run, r"folder lies in no output folder of a training .* Give one, or"),
        (without_its_adapter, r"There is no adapter at .*run/pytorch_lora_weights\.safetensors\. Give"),
        (with_damaged_settings, r"run lies in no output folder of a training with an args\.json that names"),
        (with_settings_of_a_stranger, r"run/args\.json: resolution is \[1\]\. Write a text or a number"),
        (with_a_number_of_a_stranger, r"run/args\.json is not as a training writes it: .*'-3' is not a whole number"),
        (without_a_split, r"run held out no pictures\. Train with --validation_split, or give it here"),
        (of_another_base, r"The adapter does not fit the unet: .*Give the base model that it was trained on"),
        (without_its_pictures, r"gone is no folder\. Give one that holds pictures"),
        (without_checkpoints, r"--checkpoints: there is no checkpoint-N in .*run\. Drop the flag"),
        (with_no_judge, r"nowhere holds no weights of a judge: .*\. Give the folder that train_miniature\.py wrote"),
        (with_no_clip, r"--clip_model .* cannot be used: .* Give a folder or a hub id of a CLIP"),
        (into_a_file, r"--output_dir .*report cannot be written: Not a directory\. Give another folder"),
        (of_its_own_base, r"--lora_scale is 0, which is the base\. Give another"),
        (with_a_seed_twice, r"--picture_seeds names a seed twice\. Give each once"),
        (with_scores_of_nothing, r"--num_pictures 0 draws nothing for .*--judge.*\. Give more"),
        (with_prompts_for_the_judge, r"--judge knows scenes of its own, and no --prompt\. Drop one"),
        (with_more_scenes_than_there_are, r"--num_pictures is 1001, but --judge has 1,000 scenes\. Give fewer"),
        (with_more_steps_than_timesteps, r"--num_inference_steps is 1001, but the scheduler has 1000 timesteps"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_cannot_be_evaluated_is_refused_in_one_line(arguments, said, run, evaluate, refused, tmp_path):
    words = arguments(run, tmp_path)
    refused(said, evaluate, *words)
    assert not (tmp_path / "report").exists()


def test_a_strangers_settings_choose_no_folder_to_write_in(run, evaluate, evaluate_script, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    private = tmp_path / "private"
    private.mkdir()
    shutil.copytree(run, tmp_path / "run")
    settings = json.loads((run / "args.json").read_text()) | {"conditioning_cache_dir": str(private)}
    (tmp_path / "run" / "args.json").write_text(json.dumps(settings))
    args = evaluate_script.parse_args(["--lora_weights", str(tmp_path / "run")])
    assert args.conditioning_cache_dir == str(tmp_path / "home" / "rasengan")
    for name, kind in (("cache_dir", "models--x"), ("conditioning_cache_dir", "prompts")):
        (tmp_path / name).mkdir()
        (tmp_path / "run" / "args.json").write_text(json.dumps(settings | {name: str(tmp_path / name)}))
        read = lambda: evaluate_script.parse_args(["--lora_weights", str(tmp_path / "run")])  # noqa: E731
        assert getattr(read(), name) != str(tmp_path / name)
        (tmp_path / name / kind).mkdir()
        assert getattr(read(), name) == str(tmp_path / name)
    (tmp_path / "run" / "args.json").write_text(json.dumps(settings))
    (private / "latents").mkdir()  # as in a cache, which is only added to
    assert evaluate_script.parse_args(["--lora_weights", str(tmp_path / "run")]).conditioning_cache_dir == str(private)


@pytest.mark.parametrize("name", ["pretrained_model_name_or_path", "train_data_dir"])
def test_a_place_of_the_run_that_is_not_here_is_said_to_be_the_runs(name, run, evaluate, refused, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    settings = json.loads((run / "args.json").read_text()) | {name: "some/folder/of/theirs"}
    (tmp_path / "run" / "args.json").write_text(json.dumps(settings))
    said = rf"some/folder/of/theirs is n.* This --{name} is that of .*run/args\.json, .* the training was started in"
    refused(said, evaluate, "--lora_weights", tmp_path / "run")
    said = refused("nowhere is n", evaluate, "--lora_weights", tmp_path / "run", f"--{name}", tmp_path / "nowhere")
    assert "args.json" not in said


def test_a_folder_without_a_judge_is_refused(run, evaluate, refused, tmp_path):
    refused(r"judge\.safetensors holds no weights of a judge", evaluate, "--lora_weights", run, "--judge", tmp_path)


def test_the_command_ends_with_the_line_and_no_traceback(run_script, tmp_path):
    finished = run_script("evaluate", "--lora_weights", tmp_path)
    assert finished.returncode == 2
    assert re.fullmatch(r"error: --lora_weights .* lies in no output folder .*\n", finished.stderr)
    assert finished.stdout == ""


def test_several_processes_are_refused(evaluate, run, refused, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    refused("evaluate.py is one process. Start it by `python`", evaluate, "--lora_weights", run)

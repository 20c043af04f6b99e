import argparse
import json
import re
from pathlib import Path

import pytest
import yaml

from rasengan import UserError, training_settings


# The 55 flags of diffusers' examples/text_to_image/train_text_to_image_lora_sdxl.py, as its parser has them.
FLAGS = {flag.pop("name"): flag for flag in json.loads(Path(__file__).with_name("diffusers_flags.json").read_text())}
SWITCHES = [name for name, flag in FLAGS.items() if flag["type"] == "bool"]
OUR_DEFAULTS = {
    "center_crop": True,
    "gradient_checkpointing": None,  # as many blocks as the memory needs
    "rank": 16,
    "resolution": 512,
    "use_8bit_adam": True,
}
THEIR_CHOICES = {
    "image_interpolation_mode": ["bicubic", "bilinear", "box", "hamming", "lanczos", "nearest", "nearest_exact"],
    "lr_scheduler": ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"],
    "mixed_precision": ["no", "fp16", "bf16"],
    "prediction_type": ["epsilon", "v_prediction"],
}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)


@pytest.fixture
def parse(train_script):
    return train_script.parse_args


@pytest.fixture
def idle(train_script, parse):
    """Function that returns the flags of a command line that can do nothing."""
    return lambda words: training_settings.idle_flags(vars(parse(words)), train_script.make_parser().get_default)


@pytest.fixture
def parse_config(parse, tmp_path):
    """Parse a configuration file, given as a mapping or as its text, and what follows on the command line."""

    def parse_file(content, *argv):
        file = tmp_path / "run.yaml"
        file.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return parse(["--config", str(file), *argv])

    return parse_file


def value_for(name):
    kind = FLAGS[name]["type"]
    text = "hf_a" if name == "hub_token" else THEIR_CHOICES.get(name, ["a b"])[-1]
    return {"int": "64", "float": "0.5", "str": text}[kind]


def assert_refused(parse, *argv, named):
    with pytest.raises(UserError) as error:
        parse(*argv)
    assert named in str(error.value)
    assert "\n" not in str(error.value)


# --- a command line written for diffusers ---


@pytest.mark.parametrize("name", FLAGS)
def test_a_flag_of_diffusers_has_its_type_here(parse, name):
    kind = FLAGS[name]["type"]
    if kind == "bool":
        assert getattr(parse([f"--{name}"]), name) is True
        assert_refused(parse, [f"--{name}=yes"], named=f"--{name}")
        return
    value = getattr(parse([f"--{name}", value_for(name)]), name)
    if name == "validation_prompt":
        value = value[0]  # one prompt there, one or several here
    assert value == {"int": int, "float": float, "str": str}[kind](value_for(name))
    assert type(value).__name__ == kind
    if kind != "str":
        assert_refused(parse, [f"--{name}", "0.5" if kind == "int" else "half"], named=f"--{name}")


def test_defaults_are_those_of_diffusers_but_for_those_of_the_recipe(parse):
    ours = vars(parse([]))
    assert {name: ours[name] for name in FLAGS} == {
        name: flag["default"] for name, flag in FLAGS.items()
    } | OUR_DEFAULTS


@pytest.mark.parametrize(
    ("name", "choice"), [(n, choice) for n, choices in THEIR_CHOICES.items() for choice in choices]
)
def test_what_diffusers_lets_choose_can_be_chosen(parse, name, choice):
    assert getattr(parse([f"--{name}", choice]), name) == choice


def test_all_flags_of_diffusers_stand_in_one_command_line(parse):
    valued = [name for name in FLAGS if name not in SWITCHES]
    apart = parse([word for name in valued for word in (f"--{name}", value_for(name))] + [f"--{n}" for n in SWITCHES])
    joined = parse([f"--{name}={value_for(name)}" for name in valued] + [f"--{name}" for name in SWITCHES])
    assert apart == joined
    assert len(FLAGS) == len(valued) + len(SWITCHES) == 55
    assert all(getattr(apart, name) is True for name in SWITCHES)
    assert all(str(getattr(apart, name)) == value_for(name) for name in valued if name != "validation_prompt")
    assert apart.validation_prompt == ["a b"]


@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_is_negated_by_no(parse, name):
    assert getattr(parse([f"--{name}", f"--no-{name}"]), name) is False


def test_the_launchers_rank_wins_over_the_flag(parse, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert parse(["--local_rank", "1"]).local_rank == 3


# --- our own ---


def test_lora_alpha_is_twice_the_rank_where_it_is_not_given(parse):
    assert parse([]).lora_alpha == 32.0
    assert parse(["--rank", "4"]).lora_alpha == 8.0
    assert parse(["--rank", "4", "--lora_alpha", "1"]).lora_alpha == 1.0


def test_every_component_can_be_given_alone(parse):
    names = "unet text_encoder text_encoder_2 tokenizer tokenizer_2 scheduler".split()
    args = parse([word for name in names for word in (f"--pretrained_{name}_name_or_path", f"folder/{name}")])
    assert all(getattr(args, f"pretrained_{name}_name_or_path") == f"folder/{name}" for name in names)
    assert args.pretrained_model_name_or_path is None


def test_several_prompts_and_targets_are_lists(parse):
    args = parse(["--validation_prompt", "a cat", "a dog", "--lora_target_modules", "to_q", "to_out.0"])
    assert (args.validation_prompt, args.lora_target_modules) == (["a cat", "a dog"], ["to_q", "to_out.0"])


@pytest.mark.parametrize(
    "argv",
    [
        ("--rank", "0"),
        ("--rank", "4.5"),
        ("--train_batch_size", "-1"),
        ("--resolution", "0"),
        ("--seed", "-1"),
        ("--seed", "4294967296"),  # numpy, which set_seed seeds too, takes 32 bits
        ("--learning_rate", "nan"),
        ("--learning_rate", "inf"),
        ("--learning_rate", "-1e-4"),
        ("--lora_alpha", "0"),
        ("--snr_gamma", "0"),
        ("--max_grad_norm", "nan"),
        ("--mixed_precision", "fp8"),
        ("--lr_scheduler", "square"),
        ("--image_interpolation_mode", "cubic"),
        ("--prediction_type", "sample"),
        ("--validation_split", "0"),
        ("--validation_split", "0.0"),
        ("--validation_split", "1.0"),
        ("--validation_split", "1.5"),
        ("--validation_split", "-3"),
        ("--validation_split", "nan"),
        ("--validation_split", "half"),
        ("--no-rank", "4"),
        ("--lora_rank", "4"),
    ],
    ids=" ".join,
)
def test_a_value_that_cannot_be_meant_is_refused_by_the_name_of_its_flag(parse, argv):
    assert_refused(parse, list(argv), named=argv[0])


@pytest.mark.parametrize(("text", "value"), [("0.05", 0.05), (".5", 0.5), ("5e-2", 0.05), ("1", 1), ("40", 40)])
def test_a_split_is_a_share_or_a_number(parse, parse_config, text, value):
    for args in (parse(["--validation_split", text]), parse_config({"validation_split": value})):
        assert args.validation_split == value
        assert type(args.validation_split) is type(value)


def test_a_word_that_is_not_utf8_is_refused(train_script, infer_script, convert_script, check_script):
    for script in (train_script, infer_script, convert_script, check_script):
        for words in (["--output_dir", "out\udcff"], ["--output_dir=out\udcff"]):
            with pytest.raises(UserError, match=r"The value of --output_dir is not UTF-8\. Give"):
                script.parse_args(words)
    with pytest.raises(UserError, match=r"The first word is not UTF-8\. Give"):
        train_script.parse_args(["out\udcff"])
    assert train_script.parse_args(["--output_dir", "東京 é \N{SNOWMAN}"]).output_dir == "東京 é \N{SNOWMAN}"


@pytest.mark.parametrize(
    "words",
    [
        ["--hub-token", "hf_SECRET"],
        ["--hub-token=hf_SECRET"],
        ["--hub_tokenhf_SECRET"],
        ["--hub-tokenhf_SECRET"],
        ["--hub_token", "hf_", "SECRET"],
        ["--hub-token", "hf_SECRET", "--hub_token", "hf_SECRET"],
        ["--hub_token", "hf_SECRET\udce9"],
        ["--hub_token=hf_SECRET\udce9"],
        ["--hub-token=hf_SECRET\udce9"],
        ["--hub_token", "hf_SECRÉT"],
        ["--hub_token", "SECRET of mine"],
        ["--hub_token", "-hf_SECRET"],
        ["--push_to_hub=hf_SECRET"],
        ["hf_SECRET"],
    ],
    ids=ascii,
)
def test_what_is_said_of_a_wrong_command_line_holds_no_token(parse, words):
    with pytest.raises(UserError) as error:
        parse(words)
    assert not any(part in str(error.value) for part in ("SECR", "hf_", "mine"))
    if words[0].startswith("--"):
        assert re.match("--(hub.token|push_to_hub)", words[0])[0] in str(error.value)


def test_a_token_loses_the_space_around_it_and_must_not_be_empty(parse):
    assert parse(["--hub_token", " hf_SECRET\r\n"]).hub_token == "hf_SECRET"
    assert_refused(parse, ["--hub_token", ""], named="--hub_token: it is empty")


def test_words_that_no_flag_takes_are_told_of_by_their_place(parse):
    assert_refused(parse, ["--output_dir", "my", "folder"], named="unrecognized arguments: what follows --output_dir.")
    assert_refused(parse, ["--lora_rank", "4", "--no-rank=5"], named="arguments: --lora_rank, --no-rank.")
    assert_refused(parse, ["-r", "4"], named="unrecognized arguments: the first word.")


# --- the configuration file ---


def test_a_configuration_file_says_what_the_command_line_says(parse, parse_config):
    settings = {"rank": 8, "output_dir": "a folder", "validation_prompt": ["a cat", "a dog"], "seed": 3}
    from_file = parse_config("learning_rate: 1e-3\ncenter_crop: false\nrandom_flip: true\n" + yaml.safe_dump(settings))
    argv = ["--learning_rate", "1e-3", "--no-center_crop", "--random_flip", "--rank", "8", "--seed", "3"]
    expected = parse([*argv, "--output_dir", "a folder", "--validation_prompt", "a cat", "a dog"])
    assert vars(from_file) | {"config": None} == vars(expected)
    assert from_file.learning_rate == 1e-3
    assert from_file.validation_prompt == ["a cat", "a dog"]


def test_a_configuration_file_can_hold_every_flag(train_script, parse_config):
    defaults = vars(train_script.parse_args([]))
    settings = {name: value for name, value in defaults.items() if name != "config"}
    assert vars(parse_config(settings)) | {"config": None} == defaults
    actions = train_script.make_parser()._actions
    switches = [a.dest for a in actions if isinstance(a, argparse.BooleanOptionalAction)]
    swapped = vars(parse_config({name: not defaults[name] for name in switches}))
    assert {name: swapped[name] for name in switches} == {name: not defaults[name] for name in switches}


def test_a_single_prompt_is_one_prompt(parse_config):
    assert parse_config({"validation_prompt": "a cat -- on a mat"}).validation_prompt == ["a cat -- on a mat"]
    assert parse_config({"validation_prompt": [1, "b"]}).validation_prompt == ["1", "b"]


def test_a_null_leaves_the_default(parse_config):
    args = parse_config("rank: null\nlora_alpha:\nseed: ~\n")
    assert (args.rank, args.lora_alpha, args.seed) == (16, 32.0, None)


def test_an_empty_file_changes_nothing(parse, parse_config):
    assert vars(parse_config("# nothing\n")) | {"config": None} == vars(parse([]))


def test_the_command_line_wins_wherever_the_config_flag_stands(parse, parse_config, tmp_path):
    settings = {"rank": 8, "center_crop": False, "gradient_checkpointing": True, "validation_prompt": ["a", "b"]}
    argv = ["--rank=32", "--center_crop", "--no-gradient_checkpointing", "--validation_prompt", "c"]
    args = parse_config(settings, *argv)
    assert (args.rank, args.center_crop, args.gradient_checkpointing) == (32, True, False)
    assert args.validation_prompt == ["c"]
    assert parse([*argv, f"--config={tmp_path / 'run.yaml'}"]) == args


def test_an_abbreviated_config_flag_is_not_silently_ignored(parse, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("rank: 8\n")
    try:
        args = parse(["--conf", str(file)])
    except UserError:
        return
    assert args.rank == 8


def test_a_precision_of_no_needs_no_quotes(parse_config):
    # YAML reads a bare `no` as false.
    assert parse_config("mixed_precision: 'no'\n").mixed_precision == "no"
    assert parse_config("mixed_precision: no\n").mixed_precision == "no"


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("no_such_flag: 1\n", "no_such_flag"),
        ("config: other.yaml\n", "config"),
        ("- rank\n- 8\n", "rank: 16"),
        ("rank 8\n", "rank: 16"),
        ("rank: [8\n", "cannot be read"),
        ("rank: eight\n", "--rank"),
        ("rank: 0\n", "--rank"),
        ("rank: [8, 9]\n", "9"),
        ("learning_rate: .nan\n", "--learning_rate"),
        ("center_crop: 1\n", "center_crop"),
        ("center_crop: 'no'\n", "center_crop"),
        ("mixed_precision: fp8\n", "--mixed_precision"),
        ("validation_prompt: []\n", "validation_prompt is []"),
        ("validation_prompt: ['--rank', b]\n", "do not begin with a dash"),
        ("validation_prompt: [true]\n", "validation_prompt is [True]. Write one or several texts or numbers"),
        ("output_dir: ''\n", "--output_dir: it is empty"),
        ("output_dir: 2026-01-01\n", "Write a text or a number"),
        ("[]\n", "rank: 16"),
        ("false\n", "rank: 16"),
        ("output_dir: {a: 1}\n", "output_dir is {'a': 1}. Write a text or a number"),
        ("output_dir: true\n", "output_dir is True. Write a text or a number"),
        ("hub_model_id: 2026-13-01\n", "month must be in 1..12. Correct it."),
        ("seed: !!int abc\n", "'abc'. Correct it."),
        ("rank: 4\nseed: {a\n", "in line 3, column 1. Correct it."),
        ("rank: &a [x]\nseed: *a\n", "line 2 names another value by an alias. Write the value itself."),
        (f"rank: {'[' * 3000}{']' * 3000}", "cannot be read: maximum recursion depth"),
    ],
)
def test_a_wrong_configuration_file_is_refused_by_name(parse_config, content, named):
    assert_refused(parse_config, content, named=named)


def test_a_short_configuration_file_makes_no_long_error(parse_config):
    content = "[x,x,x,x,x,x,x,x,x]"
    for number in range(4):
        content = f"[&a{number} {content}{8 * f', *a{number}'}]"
    with pytest.raises(UserError) as error:
        parse_config(f"rank: {content}\n")
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    "line",
    [
        "hub_token: secret: x",
        "hub_token: 'secret",
        "hub_token: [secret]",
        "a: b: secret",
        "hub_token secret: 1",
        "hub_tokensecret: 1",
        "hub-token secret: 1",
    ],
)
def test_what_is_said_of_a_wrong_configuration_file_holds_no_token(parse_config, line):
    with pytest.raises(UserError) as error:
        parse_config(f"rank: 4\n{line}\n")
    assert "run.yaml" in str(error.value)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("rank: 4\nseed: 1\nrank: 8\n", "line 3 gives 'rank' again, after line 1. Keep one of them"),
        ("{rank: 4, 'rank': 4}", "line 1 gives 'rank' again, after line 1"),
        ("hub_token hf_secret: 1\nhub_token hf_secret: 2\n", "line 2 gives 'hub_token' again"),
    ],
)
def test_a_name_that_a_configuration_file_gives_twice_is_refused(parse_config, text, named):
    with pytest.raises(UserError) as error:
        parse_config(text)
    assert f"run.yaml: {named}" in str(error.value)
    assert "secret" not in str(error.value)


def test_a_configuration_file_that_is_not_there_is_refused_by_name(parse, tmp_path):
    assert_refused(parse, ["--config", str(tmp_path / "none.yaml")], named="none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00rank")
    assert_refused(parse, ["--config", str(tmp_path / "binary.yaml")], named="binary.yaml")


# --- flags that can do nothing ---


def test_flags_that_can_do_nothing_are_named(idle):
    words = ["--train_data_dir=x", "--debug_loss", "--report_to=none", "--dataset_config_name=a", "--hub_model_id=b"]
    words += [
        "--lr_power=2",
        "--lr_num_cycles=3",
        "--lr_step_rules=1:2,3",
        "--no-center_crop",
        "--encode_batch_size=1",
    ]
    words += ["--num_validation_images=2", "--lr_warmup_steps=7", "--logging_dir=c"]
    words += ["--num_train_epochs=3", "--max_train_steps=9", "--validation_loss_steps=5"]
    named = {"debug_loss", "dataset_config_name", "hub_model_id", "lr_power", "lr_num_cycles", "lr_step_rules"}
    named |= {"encode_batch_size", "num_validation_images", "lr_warmup_steps", "logging_dir", "num_train_epochs"}
    named |= {"validation_loss_steps"}
    assert set(idle(words)) == {f"--{name}" for name in named}


def test_flags_that_do_something_are_not_named(idle):
    assert idle([]) == []
    words = ["--dataset_name=x", "--debug_loss", "--dataset_config_name=a", "--push_to_hub", "--hub_model_id=b"]
    words += ["--lr_scheduler=polynomial", "--lr_power=2", "--encode_batch_size=1", "--validation_prompt=a"]
    words += ["--num_validation_images=2", "--lr_warmup_steps=7", "--num_train_epochs=3"]
    words += ["--validation_split=4", "--validation_loss_steps=5"]
    assert idle(words) == []


def test_help_shows_the_example_as_it_is_typed(train_script, infer_script, convert_script, check_script, capsys):
    for script in (train_script, infer_script, convert_script, check_script):
        with pytest.raises(SystemExit):
            script.parse_args(["--help"])
        shown = capsys.readouterr().out
        assert " \\\n" in shown
        assert max(map(len, shown.splitlines())) < 140


def test_a_number_beyond_all_floats_is_refused_by_the_name_of_its_flag(parse):
    assert_refused(parse, ["--rank", "1" + 400 * "0"], named="--rank")


PLACES = {"dataset_name", "resume_from_checkpoint", "lora", "input", "output", "extract_from", "base"}


def test_the_report_takes_the_flags_of_the_data_as_training_does(train_script, check_script):
    words = ["--train_data_dir", "a", "--resolution", "768", "--no-center_crop", "--skip_bad_images", "--random_flip"]
    words += ["--dataset_name", "b", "--dataset_config_name", "c", "--image_column", "d", "--caption_column", "e"]
    words += ["--max_train_samples", "7", "--image_interpolation_mode", "box", "--seed", "3", "--cache_dir", "f"]
    for given in ([], words):
        training, report = (vars(script.parse_args(given)) for script in (train_script, check_script))
        for name in report.keys() - {"strict", "output_dir"}:
            assert (name, training[name]) == (name, report[name])


def test_no_flag_that_names_a_place_takes_an_empty_text(train_script, infer_script, convert_script, check_script):
    convert = ["--output", "a.safetensors", "--format", "kohya"]
    words_of = {train_script: [], infer_script: ["--prompt", "a"], convert_script: convert, check_script: []}
    for script, words in words_of.items():
        args = vars(script.parse_args(words))
        places = [name for name in args if name.endswith(("_dir", "_path", "_file", "_weights", "_merged", "config"))]
        for name in [*places, *PLACES & args.keys()]:
            assert_refused(script.parse_args, [*words, f"--{name}", ""], named=f"--{name}: it is empty")


@pytest.mark.parametrize(
    ("text", "scales"),
    [("-1,0", [-1, 0]), ("-1", [-1]), ("-.5,.5", [-0.5, 0.5]), ("-1e-3", [-1e-3]), ("0,-2", [0, -2])],
)
def test_scales_may_begin_with_a_minus(infer_script, text, scales):
    words = ["--lora_weights", "a", "--lora_scale", text, "--compare"]
    assert infer_script.parse_args(words).lora_scale == scales

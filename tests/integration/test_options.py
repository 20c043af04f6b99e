"""Each option does what it says within a run of a few steps."""

import json

import pytest
import torch
from diffusers.optimization import get_scheduler
from safetensors.torch import load_file

from rasengan import UserError, cache, fused, memory, samples, training_settings
from rasengan.sources import TEXT_ENCODERS


ADAPTER = "pytorch_lora_weights.safetensors"
FEW = ["--lora_target_modules", "to_v", "attn2.to_k"]  # of 136 modules 51, for speed
SHORT = ["--max_train_samples", "4", "--max_train_steps", "2", "--checkpointing_steps", "9", *FEW]
QUIET = ["--report_to", "none"]


def bits(output_dir) -> dict[str, bytes]:
    """Return the bytes of each of the adapter's matrices."""
    return {key: tensor.numpy().tobytes() for key, tensor in load_file(output_dir / ADAPTER).items()}


@pytest.fixture(scope="module")
def plain(train):
    """Output folder of a short run without any of the options."""
    return train(*SHORT)


@pytest.mark.parametrize(
    "flags",
    [
        ["--random_flip"],
        ["--no-center_crop"],
        ["--aspect_ratio_buckets", "--bucket_step_px", 16],
        ["--snr_gamma", 0.1],
        ["--noise_offset", 0.1],
        ["--prediction_type", "v_prediction"],
        ["--lora_dropout", 0.5],
        ["--lora_init", "default"],
        ["--image_interpolation_mode", "nearest"],
        ["--gradient_accumulation_steps", 2],
        ["--no-use_8bit_adam"],
        ["--optimizer", "prodigy"],
        ["--max_grad_norm", 0.001, "--adam_epsilon", 0.01],
        ["--scale_lr"],
        ["--base_quantization", "nf4"],
        ["--mixed_precision", "bf16"],
    ],
    ids=lambda flags: flags[0][2:],
)
def test_an_option_changes_what_is_trained(flags, train, plain):
    weights = load_file(train(*SHORT, *QUIET, *flags) / ADAPTER)
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    before = load_file(plain / ADAPTER)
    assert weights.keys() == before.keys()
    assert any(not torch.equal(tensor, before[key]) for key, tensor in weights.items())


@pytest.mark.parametrize(
    "flags",
    [
        ["--dataloader_num_workers", 1],
        ["--gradient_checkpointing"],
        ["--allow_tf32"],
        ["--debug_loss"],
    ],
    ids=lambda flags: flags[0][2:],
)
def test_an_option_changes_nothing_that_is_trained(flags, train, plain):
    assert bits(train(*SHORT, *flags)) == bits(plain)


@pytest.mark.parametrize(("flag", "share"), [("--gradient_checkpointing", 1), ("--no-gradient_checkpointing", 0)])
def test_the_plan_is_what_the_steps_do_and_a_checkpoint_keeps_it(flag, share, train, monkeypatch):
    asked, recompute = [], fused.FusedUNet.recompute

    def note_and_recompute(unet, count):
        asked.append((count, len(unet.units())))
        recompute(unet, count)

    monkeypatch.setattr(fused.FusedUNet, "recompute", note_and_recompute)
    output_dir = train(*SHORT, *QUIET, flag)
    count, blocks = asked[-1]
    assert count == share * blocks
    assert blocks > 5
    (saved,) = output_dir.glob("checkpoint-*")
    assert json.loads((saved / "trainer_state.json").read_text())["memory_plan"] == [2, count, 0]


def test_a_flag_without_effect_makes_no_other_cache(train, tmp_path):
    cache = ["--conditioning_cache_dir", tmp_path]
    train(*SHORT, *QUIET, *cache, "--allow_tf32")  # no TF32 on a CPU
    shards = set(tmp_path.rglob("*.safetensors"))
    assert shards
    train(*SHORT, *QUIET, *cache)
    assert set(tmp_path.rglob("*.safetensors")) == shards


def test_rank_and_targets_shape_the_adapter(train):
    weights = load_file(train(*SHORT, *QUIET, "--rank", 4, "--lora_target_modules", "attn2.to_k", "to_v") / ADAPTER)
    assert {tensor.shape[0] for key, tensor in weights.items() if key.endswith("down.weight")} == {4}
    assert {key.rsplit(".lora.")[0].rpartition("attn")[2] for key in weights} == {"2.to_k", "1.to_v", "2.to_v"}


def test_epochs_count_the_optimizer_steps_that_see_every_picture(train, read_scalars):
    few = ["--max_train_samples", 5, "--num_train_epochs", 2]
    output_dir = train(*few, without=("--max_train_steps",))
    assert sorted(read_scalars(output_dir, "train_loss")) == [1, 2, 3, 4, 5, 6]  # ceil(5 / 2) an epoch


@pytest.mark.parametrize(
    ("name", "flags", "options"),
    [
        ("constant", [], {}),
        ("constant_with_warmup", ["--lr_warmup_steps", 2], {"num_warmup_steps": 2}),
        ("linear", ["--lr_warmup_steps", 1], {"num_warmup_steps": 1}),
        ("cosine", ["--lr_warmup_steps", 1], {"num_warmup_steps": 1}),
        ("cosine_with_restarts", ["--lr_warmup_steps", 0, "--lr_num_cycles", 2], {"num_warmup_steps": 0}),
        ("polynomial", ["--lr_warmup_steps", 0, "--lr_power", 2], {"num_warmup_steps": 0, "power": 2}),
        ("piecewise_constant", ["--lr_step_rules", "1:2,0.1"], {"step_rules": "1:2,0.1"}),
    ],
)
def test_every_schedule_gives_the_rates_of_diffusers(name, flags, options, train, read_scalars):
    output_dir = train(*SHORT, "--max_train_steps", 3, "--lr_scheduler", name, *flags)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-3)
    if name == "cosine_with_restarts":
        options |= {"num_cycles": 2}
    schedule = get_scheduler(name, optimizer, num_training_steps=3, **options)
    expected = []
    for _ in range(3):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert list(read_scalars(output_dir, "lr").values()) == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_debug_loss_logs_the_loss_of_each_picture_by_its_name(train, read_log):
    log = read_log(train(*SHORT, "--debug_loss"))
    tags = log.Tags()["scalars"]
    names = [tag.removeprefix("loss_for_") for tag in tags if tag.startswith("loss_for_")]
    assert len(names) == 4
    assert all(name.split(".")[0].isdigit() for name in names)
    steps = {event.step for name in names for event in log.Scalars(f"loss_for_{name}")}
    assert steps == {event.step for event in log.Scalars("train_loss")} == {1, 2}


def test_text_encoders_are_trained_and_their_adapters_are_merged(train, draw, capsys):
    output_dir = train(*SHORT, *QUIET, "--train_text_encoder")
    weights = load_file(output_dir / ADAPTER)
    for component in ("unet", *TEXT_ENCODERS):
        ups = [tensor for key, tensor in weights.items() if key.startswith(f"{component}.") and ".up." in key]
        assert any(tensor.abs().max() > 0 for tensor in ups), component
    pictures = {}
    for name, path in (("file", output_dir), ("peft", output_dir / "peft")):
        pictures[name] = draw("--lora_weights", path, "--prompt", "a red star", "--compare")
        printed = capsys.readouterr().out
        for component in ("unet", *TEXT_ENCODERS):
            assert f"modules of the {component} at alpha 32 / rank 16" in printed
    for name in ("000-0-a-red-star-base.png", "000-0-a-red-star-tuned.png"):
        assert pictures["file"][name].tobytes() == pictures["peft"][name].tobytes()


def test_the_loss_falls_under_that_of_the_untrained_model(train, read_scalars, caplog):
    # A sample's noise and timestep follow from the seed alone, so the two runs meet the same tasks, step by step:
    # what remains between their losses is what was learned.
    run = ["--max_train_samples", 2, "--train_batch_size", 1, "--max_train_steps", 60, "--checkpointing_steps", 99]
    losses = [list(read_scalars(train(*run, "--learning_rate", lr), "train_loss").values()) for lr in (1e-3, 0)]
    assert "--learning_rate is 0: nothing is learned" in caplog.text
    trained, untrained = torch.tensor(losses)
    assert trained[0] == untrained[0]
    assert trained[-20:].mean() < 0.98 * untrained[-20:].mean()
    assert (trained[-20:] < untrained[-20:]).float().mean() > 0.9


@pytest.mark.parametrize(("allowed", "tried"), [("auto", ["auto", "nf4"]), ("none", ["none"]), ("nf4", ["nf4"])])
def test_a_base_is_quantized_where_that_is_allowed_and_needed(allowed, tried, train_script, monkeypatch):
    seen = []

    def train(args, *_):
        seen.append(args.base_quantization)
        if len(seen) == 1:
            raise memory.DoesNotFit("The smallest plan takes 5 GiB, but the budget is 4 GiB. Buy more.")
        return 0

    monkeypatch.setattr(train_script, "train", train)
    args = train_script.parse_args(["--base_quantization", allowed])
    if allowed == "auto":
        assert train_script.train_in_what_fits(args, 0.0, None) == 0
    else:
        with pytest.raises(memory.DoesNotFit):
            train_script.train_in_what_fits(args, 0.0, None)
    assert seen == tried


def test_a_base_that_fits_is_not_quantized(train, plain):
    output_dir = train(*SHORT, "--base_quantization", "auto")
    assert bits(output_dir) == bits(plain)
    assert json.loads((output_dir / "args.json").read_text())["base_quantization"] == "none"


def test_a_gradient_is_clipped_to_the_norm_that_was_given(train, read_scalars):
    run = [*SHORT, "--no-use_8bit_adam", "--max_train_steps", 1, "--checkpointing_steps", 1]
    for most, expected in ((1e-3, 1e-3), (1e6, None)):
        output_dir = train(*run, "--max_grad_norm", most)
        state = torch.load(output_dir / "checkpoint-1" / "optimizer.bin", weights_only=True)["state"][0]
        before = read_scalars(output_dir, "grad_norm")[1]
        # After one step AdamW's first moment is a tenth of the gradient that it was given.
        assert 10 * state["exp_avg"].norm().item() == pytest.approx(expected or before, rel=1e-4)
        assert 1e-3 < before < 1e6


def test_an_average_is_that_of_the_weights_after_each_step(train):
    run = [*SHORT, *QUIET, "--use_ema", "--max_train_steps", 3, "--checkpointing_steps", 1]
    output_dir = train(*run)
    folders = [output_dir / f"checkpoint-{step}" for step in (1, 2, 3)]
    live, average = ([load_file(folder / inner / ADAPTER) for folder in folders] for inner in (".", "ema"))
    for step in (2, 3):
        decay = step / (9 + step)  # it grows with the steps, up to --ema_decay
        for key, tensor in average[step - 1].items():
            expected = decay * average[step - 2][key] + (1 - decay) * live[step - 1][key]
            torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-8)
    assert any(not torch.equal(tensor, live[2][key]) for key, tensor in average[2].items())
    assert bits(output_dir) == bits(folders[2] / "ema")


@pytest.mark.parametrize(
    ("flags", "loaded_too"),
    [
        (["--aspect_ratio_buckets", "--bucket_step_px", 16, "--random_flip", "--mixed_precision", "bf16"], set()),
        (["--train_text_encoder"], {"text_encoder", "text_encoder_2"}),
        (["--no-center_crop", "--validation_prompt", "a"], {"vae"}),
        (["--no-cache_conditioning"], {"vae", "text_encoder", "text_encoder_2"}),
    ],
    ids=["cached", "text encoders in the loop", "VAE in the loop", "all in the loop"],
)
def test_a_run_that_is_only_planned_encodes_nothing_and_tries_the_batch_of_a_real_one(
    flags, loaded_too, train, loaded, tmp_path, monkeypatch
):
    made, make_samples = [], samples.TrainingSamples

    def note(*arguments, **options):
        made.append(make_samples(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(samples, "TrainingSamples", note)
    monkeypatch.setattr(training_settings, "check", lambda *_: None)  # which refuses a plan without a card
    words = [*SHORT, *QUIET, *flags, "--conditioning_cache_dir", tmp_path / "cache"]
    planned = train(*words, "--plan_only")
    assert not list(planned.iterdir())
    assert [path.name for path in (tmp_path / "cache").rglob("*") if not path.name.startswith("pictures-")] == []
    assert set(loaded) == {"scheduler", "tokenizer", "unet"} | loaded_too | (
        {"tokenizer_2"} if "text_encoder" in loaded_too else set()
    )
    (blank,) = made
    train(*words, "--max_train_steps", 1)
    assert list((tmp_path / "cache").rglob("*.safetensors")) or "--no-cache_conditioning" in flags
    tried, real = (samples.first_batch(one, 2) for one in (blank, made[1]))
    assert tried.keys() == real.keys()
    for name, value in real.items():
        if torch.is_tensor(value):
            assert (tried[name].shape, tried[name].dtype) == (value.shape, value.dtype), name
        else:
            assert tried[name] == value


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "load_picture_encoder",
            "pictures at 64 px, 3 at once, .* 7. To make it fit: give --encode_batch_size 1, or ra",
        ),
        ("load_caption_encoder", "captions or prompts, 8 at once, .* 7. To make it fit: raise --vram_budget_gib"),
    ],
)
def test_a_training_whose_encoders_lack_memory_says_what_was_asked_for(name, said, train, tmp_path, monkeypatch):
    def encode(items):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(cache, name, lambda *_, **__: encode)
    words = ["--conditioning_cache_dir", tmp_path, "--encode_batch_size", 3, "--vram_budget_gib", 7]
    with pytest.raises(UserError, match=f"Out of memory while encoding {said}"):
        train(*SHORT, *QUIET, *words, "--base_quantization", "auto")

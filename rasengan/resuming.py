"""Which settings a resume may change: none of those that its weights hang on, and others if that is meant."""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

from rasengan import UserError
from rasengan.checkpoint import read_state
from rasengan.sources import COMPONENT_FLAGS


logger = logging.getLogger(__name__)

# What the weights and the optimizer's state mean hangs on these.
BOUND_SETTINGS = {
    *("rank", "lora_alpha", "lora_target_modules", "train_text_encoder", "optimizer", "use_8bit_adam"),
    *("mixed_precision", "prediction_type", "resolution", "aspect_ratio_buckets", "bucket_step_px"),
    *("seed", "data_digest"),
}
# Where things are, and how this start was asked for: told of nowhere, and the token must not be.
PLACES = {
    *("output_dir", "logging_dir", "cache_dir", "conditioning_cache_dir", "config", "local_rank", "plan_only"),
    *("resume_from_checkpoint", "resume_with_changes", "hub_token"),
}
# What is trained does not hang on these: which data there are (their digest is bound), how long and how a run is
# split, what it shows and keeps.
FREE_SETTINGS = {
    *("dataset_name", "dataset_config_name", "train_data_dir", "image_column", "caption_column", "max_train_samples"),
    *("skip_bad_images", "max_train_steps", "num_train_epochs", "max_train_minutes"),
    *("train_batch_size", "gradient_accumulation_steps", "dataloader_num_workers", "gradient_checkpointing"),
    *("vram_budget_gib", "cuda_graph", "validation_prompt", "num_validation_images", "validation_epochs"),
    *("num_processes", "validation_inference_steps", "validation_loss_steps", "save_best", "checkpointing_steps"),
    *("checkpointing_minutes", "checkpoints_total_limit", "logging_steps", "report_to", "debug_loss", "push_to_hub"),
    "hub_model_id",
}
# Where the base is, which may move: what it holds is told by its digest.
BASE_PLACES = {"pretrained_model_name_or_path", "revision", "variant"}
BASE_PLACES |= {flag.removeprefix("--") for flag in COMPONENT_FLAGS.values()}
# How a step is split: dropout draws for each part of it anew.
SPLIT = {"train_batch_size", "gradient_accumulation_steps", "num_processes"}
RUN_LENGTH = {"total_steps"}  # told of below, where it changes what is trained
CONSTANT_SCHEDULES = {"constant", "constant_with_warmup", "piecewise_constant"}


def check_resumable(path: Path, settings: dict, allow_changes: bool = False, idle: Iterable[str] = ()) -> None:
    """Check that a checkpoint is gone on with by the settings that it was written with, but for `FREE_SETTINGS`.

    Of a checkpoint that knows the digest of its base, the base may have moved, too.

    Args:
        path: the checkpoint.
        settings: all of a run's, or only those that are known by now; None stands for one that is not known.
        allow_changes: warn of changed settings, but for `BOUND_SETTINGS`.
        idle: settings that do nothing beside the others.

    Raises:
        UserError: some have changed that may not; they are listed. The others are logged.
    """
    state, idle = read_state(path), set(idle)
    bound_names = BOUND_SETTINGS - idle
    names = [name for name in settings if name in state and name not in PLACES | RUN_LENGTH]
    unknown = {n for n in names if n in bound_names and None in (state[n], settings[n])}
    changed = [n for n in names if n not in unknown and _plain(state[n]) != _plain(settings[n])]
    may_change = FREE_SETTINGS | idle | (BASE_PLACES if state.get("base_digest") else set())
    may_change -= SPLIT if settings.get("lora_dropout") else set()
    free = "; ".join(_change(name, state, settings) for name in changed if name in may_change)
    bound = "; ".join(_change(name, state, settings) for name in changed if name in bound_names)
    both = may_change | bound_names
    others = "; ".join(_change(name, state, settings) for name in changed if name not in both)
    if free:
        logger.info("%s was written with other settings, which may change: %s", path, free)
    if others and allow_changes:
        logger.warning("%s was written with other settings: %s", path, others)
    if bound:
        too = f" And only --resume_with_changes allows this: {others}." if others and not allow_changes else ""
        raise UserError(
            f"{path} cannot be resumed with other settings: {bound}. Give the former, or start afresh in another "
            f"--output_dir.{too}"
        )
    if others and not allow_changes:
        raise UserError(
            f"{path} was written with other settings: {others}. Give the former, or --resume_with_changes to go on "
            "as another run would."
        )
    length = [n for n in RUN_LENGTH if n in state and settings.get(n) is not None and state[n] != settings[n]]
    if length and settings.get("lr_scheduler", "constant") not in CONSTANT_SCHEDULES:
        listed = "; ".join(_change(name, state, settings) for name in length)
        logger.warning("%s: --lr_scheduler %s goes on over the new length", listed, settings["lr_scheduler"])


def say_resumed(path: Path, state: Mapping, total_steps: int) -> None:
    """Say from which checkpoint a run goes on, and warn where its weights may be bad, or nothing is left to train.

    Args:
        path: the checkpoint.
        state: of it.
        total_steps: after which the run ends.
    """
    logger.info("Resuming from %s", path)
    if skipped := state.get("skipped_in_a_row"):
        logger.warning("The %d steps before it had no finite gradient: its weights may be ruined", skipped)
    if state["global_step"] >= total_steps:
        logger.warning("It has %d steps of %d already: nothing is left to train", state["global_step"], total_steps)


def plan_to_keep(state: Mapping, settings: Mapping, card: str) -> list[int] | None:
    """Return the memory plan of a checkpoint's state, or None where steps are to be planned anew.

    That is on another kind of card, with --resume_with_changes, and with a --vram_budget_gib that was not the run's
    before: who gives more room wants it used.
    """
    is_same_budget = settings["vram_budget_gib"] in (None, state.get("vram_budget_gib"))
    can_keep = state.get("card") == card and is_same_budget and not settings["resume_with_changes"]
    return state.get("memory_plan") if can_keep else None


def check_samples_at_once(path: Path, micro_batch_size: int) -> None:
    """Check that a run with dropout takes as many samples at once as the one that wrote the checkpoint.

    Raises:
        UserError: it does not.
    """
    before = (read_state(path).get("memory_plan") or [micro_batch_size])[0]  # none once it did not fit
    if before != micro_batch_size:
        raise UserError(
            f"{path} was written by a run that took {before} samples at once, and this takes {micro_batch_size}, for "
            "which --lora_dropout draws otherwise. Give the former --vram_budget_gib and --gradient_checkpointing on "
            "such a card, or --resume_with_changes to go on as another run would."
        )


def _plain(value):
    # The order of a list of modules means nothing, nor the slash behind a folder.
    return (
        sorted(value, key=str) if isinstance(value, list) else value.rstrip("/") if isinstance(value, str) else value
    )


def _change(name: str, state: dict, settings: dict) -> str:
    if name == "data_digest":
        return "the pictures or captions are not those that it saw (some were added, removed, changed or reordered)"
    if name == "base_digest":
        return "the base is not the one that it saw (weights, configurations or tokenizers)"
    if name == "global_batch":
        return (
            f"a step took {state[name]} samples, and takes {settings[name]} (--train_batch_size x "
            "--gradient_accumulation_steps x processes)"
        )
    if name == "total_steps":
        return f"the run was to have {state[name]} steps, and is to have {settings[name]}"
    was, now = ("not given" if value is None else value for value in (state[name], settings[name]))
    return f"--{name} was {was}, and is {now}"

"""What the flags of a training mean together: which do nothing, which are refused, and what is made of them.

Settings are the script's flags by their names, without dashes.
"""

import importlib.util
import json
import logging
import os
from collections.abc import Callable, Mapping, MutableMapping
from pathlib import Path

import torch
from accelerate.tracking import get_available_trackers
from diffusers.optimization import SchedulerType

from rasengan import UserError, checkpoint, data, export, first_line, optim, processes
from rasengan.files import check_kinds, check_writable, write_atomically
from rasengan.memory_plan import Planner
from rasengan.resuming import BASE_PLACES, PLACES


logger = logging.getLogger(__name__)

SETTINGS_FILE = "args.json"
FOLDERS_WRITTEN = {"peft", "evaluation", checkpoint.BEST_FOLDER}
TEMPORARY = ("checkpoint-", ".saving", ".removing", ".export", ".lock")  # beginnings of names
FILES_WRITTEN = (export.DIFFUSERS_FILE, SETTINGS_FILE, "validation.png", "README.md")
# Machines may differ in where the base and the data are, whose digests are compared, and in what the first process
# alone does.
OF_A_MACHINE = PLACES - {"plan_only"} | BASE_PLACES | {"dataset_name", "dataset_config_name", "train_data_dir"}
OF_A_MACHINE |= {"dataloader_num_workers", "vram_budget_gib", "push_to_hub", "hub_model_id"}


# --- what others see of them ---


def public(settings: Mapping) -> dict:
    """Return the settings without the token, as JSON can hold them."""
    return {name: value for name, value in sorted(settings.items()) if name != "hub_token"}


def write(settings: Mapping, output_dir: Path, **more) -> None:
    """Write args.json; a run that has ended adds to it after how many steps the adapter beside it was written."""
    write_atomically(output_dir / SETTINGS_FILE, json.dumps(public(settings) | more, indent=2).encode())


def check_same_everywhere(settings: Mapping) -> None:
    """Check that all processes of the run have the settings that they must have in common.

    Raises:
        UserError: they have not.
    """
    processes.check_same_settings({name: value for name, value in settings.items() if name not in OF_A_MACHINE})


# --- which do nothing ---


def idle_settings(settings: Mapping) -> list[str]:
    """Return the names of the settings that can do nothing beside the others."""
    schedule, reports, draws = settings["lr_scheduler"], settings["report_to"] != "none", settings["validation_prompt"]
    on_gpu = torch.cuda.is_available()
    is_idle = {
        "debug_loss": not reports,
        "logging_dir": not reports,
        "dataset_config_name": settings["dataset_name"] is None,
        "hub_model_id": not settings["push_to_hub"],
        "hub_token": not settings["push_to_hub"],
        "lr_num_cycles": schedule != SchedulerType.COSINE_WITH_RESTARTS.value,
        "num_train_epochs": settings["max_train_steps"] is not None,
        "lr_warmup_steps": schedule in {"constant", "piecewise_constant"},
        "lr_power": schedule != SchedulerType.POLYNOMIAL.value,
        "lr_step_rules": schedule != SchedulerType.PIECEWISE_CONSTANT.value,
        "encode_batch_size": not (settings["cache_conditioning"] and settings["center_crop"]),
        "num_validation_images": not draws,
        "validation_epochs": not draws,
        "validation_inference_steps": not draws,
        "validation_loss_steps": settings["validation_split"] is None,
        "bucket_step_px": not settings["aspect_ratio_buckets"],
        "ema_decay": not settings["use_ema"],
        "use_8bit_adam": settings["optimizer"] != "adamw",
        "vram_budget_gib": not on_gpu,
        "base_quantization": settings["base_quantization"] == "auto" and not on_gpu,
    }
    return [name for name in is_idle if is_idle[name]]


def idle_flags(settings: Mapping, default: Callable[[str], object]) -> list[str]:
    """Return the flags that were given and can do nothing beside the others; `default` knows their defaults."""
    return [f"--{name}" for name in idle_settings(settings) if settings[name] != default(name)]


# --- which are refused ---


def check(settings: Mapping, environment: Mapping[str, str]) -> None:
    """Check what the settings and the launcher say, before anything is read, loaded or downloaded.

    Raises:
        UserError: they contradict each other, or ask for what there is not here, or for places that cannot be written.
    """
    processes.check_launch(environment)
    names = ("dataset_name", "train_data_dir", "resolution", "bucket_step_px")
    data.check_settings(*(settings[name] for name in names))
    if settings["local_rank"] > 0 and "LOCAL_RANK" not in environment:
        raise UserError(
            f"--local_rank is {settings['local_rank']}, but no launcher set up this process. Start it by "
            "`accelerate launch`."
        )
    _check_combinations(settings)
    _check_what_is_installed(settings)
    _check_optimization(settings)
    _check_places(settings)


def _check_combinations(settings: Mapping) -> None:
    for name in ("adam_beta1", "adam_beta2", "lora_dropout", "ema_decay"):
        if not settings[name] < 1:
            raise UserError(f"--{name} is {settings[name]}. Give a number from 0 to under 1.")
    if settings["deterministic"] and settings["enable_xformers_memory_efficient_attention"]:
        raise UserError("--deterministic promises equal bits, which xformers does not. Drop one of the flags.")
    if settings["save_best"] and settings["validation_split"] is None:
        raise UserError("--save_best needs a validation loss. Give --validation_split too, such as 0.05.")


def _check_what_is_installed(settings: Mapping) -> None:
    trackers = [tracker.value for tracker in get_available_trackers()]
    report_to, quantization, optimizer = (settings[name] for name in ("report_to", "base_quantization", "optimizer"))
    if report_to not in {"tensorboard", "none"} and settings["hub_token"] is not None:
        raise UserError(f"--report_to {report_to} would upload --hub_token too. Use `hf auth login` instead.")
    if report_to not in (*trackers, "all", "none"):
        raise UserError(
            f"--report_to {report_to} is not installed here; installed are: {', '.join(trackers)}. "
            "Give one of these, all or none, or install its package."
        )
    xformers, npu = "enable_xformers_memory_efficient_attention", "enable_npu_flash_attention"
    needed = {"bitsandbytes": "use_8bit_adam"} if optimizer == "adamw" and settings["use_8bit_adam"] else {}
    needed |= {"xformers": xformers} if settings[xformers] else {}
    for package, flag in needed.items():
        if importlib.util.find_spec(package) is None:
            raise UserError(f"--{flag} needs {package}, which is not installed. Install it, or give --no-{flag}.")
    if quantization != "none" and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"--base_quantization {quantization} needs bitsandbytes: install it, or give none.")
    if optimizer == "prodigy" and importlib.util.find_spec("prodigyopt") is None:
        raise UserError("--optimizer prodigy needs prodigyopt: `pip install -e '.[prodigy]'`.")
    if settings[xformers] and not torch.cuda.is_available():
        raise UserError(f"--{xformers} needs a CUDA GPU. Drop the flag.")
    if settings[npu]:
        raise UserError(f"--{npu} needs an Ascend NPU, and this trains on CUDA or CPU. Drop it.")
    if settings["plan_only"] and not torch.cuda.is_available():
        raise UserError("--plan_only needs a CUDA GPU, whose memory it plans. Drop the flag.")


def _check_optimization(settings: Mapping) -> None:
    optimizer, kind, rate = settings["optimizer"], settings["lr_scheduler"], settings["learning_rate"]
    if rate == 0:
        logger.warning("--learning_rate is 0: nothing is learned, and the adapter will change nothing")
    if optimizer == "prodigy" and rate < 0.1:
        logger.warning("--learning_rate is a factor on the rate that prodigy finds: %g is small", rate)
    if kind == "piecewise_constant" and not settings["lr_step_rules"]:
        raise UserError("--lr_scheduler piecewise_constant needs --lr_step_rules, such as '1:100,0.1'.")
    try:
        schedule_of(settings, rate, 1)
    except ValueError as error:
        rules = f" with --lr_step_rules {settings['lr_step_rules']}" if kind == "piecewise_constant" else ""
        raise UserError(f"--lr_scheduler {kind}{rules} cannot be used so: {first_line(error)}.") from error
    try:
        make_optimizer(settings, torch.nn.Parameter(torch.zeros(1)), rate)
    except ValueError as error:  # Prodigy takes no rate of 0, for example
        raise UserError(f"--optimizer {optimizer} cannot be used so: {first_line(error)}.") from error


def _check_places(settings: Mapping) -> None:
    output_dir, logging_dir = Path(settings["output_dir"]), settings["logging_dir"]
    places = {"conditioning_cache_dir": settings["conditioning_cache_dir"], "cache_dir": settings["cache_dir"]}
    places |= {"logging_dir": output_dir / logging_dir}
    data.check_outside({**settings, "logging_dir": places["logging_dir"]})
    outputs = Path(os.path.abspath(output_dir))
    for name, place in places.items():
        place = Path(os.path.abspath(place)) if place else None
        if place is None or not place.is_relative_to(outputs):
            continue
        begin = (*place.relative_to(outputs).parts, "")[0]
        taken = (*TEMPORARY, *"." * (name == "logging_dir"))  # a cache may be in a home folder's .cache
        if begin in {"", *FOLDERS_WRITTEN, *FILES_WRITTEN} or begin.startswith(taken):
            raise UserError(f"--{name} {settings[name]} is for other files in --output_dir. Give another name.")
    check_writable(output_dir, "--output_dir")
    is_folder = dict.fromkeys(FILES_WRITTEN, False)
    is_folder |= dict.fromkeys(("peft", checkpoint.BEST_FOLDER, logging_dir), True)
    check_kinds(output_dir, is_folder, "--output_dir")
    check_writable(Path(settings["conditioning_cache_dir"]), "--conditioning_cache_dir")


# --- what is made of them ---


def choose_kernels(settings: Mapping, device: torch.device, environment: MutableMapping[str, str]) -> None:
    """Let PyTorch use the kernels that were asked for: those that repeat a run to the bit, those of TF32."""
    if settings["deterministic"]:
        environment.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs for it
    # Not with warnings alone: attention's backward pass takes those for a no.
    torch.use_deterministic_algorithms(settings["deterministic"])
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing reads what was not written
    has_tf32 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    torch.backends.cuda.matmul.allow_tf32 = settings["allow_tf32"] and has_tf32
    if settings["allow_tf32"] and not has_tf32:
        logger.info("--allow_tf32 has no effect: this device has no TF32")


def schedule_of(settings: Mapping, learning_rate: float, num_training_steps: int) -> Callable[[int], float]:
    """Return the learning rate's factor as a function of the optimizer steps done."""
    counts = (settings["lr_warmup_steps"], num_training_steps, settings["lr_num_cycles"])
    shape = (settings["lr_power"], settings["lr_step_rules"])
    return optim.learning_rate_schedule(settings["lr_scheduler"], learning_rate, *counts, *shape)


def make_planner(
    settings: Mapping,
    run: Callable[[int], object],
    recompute_blocks: Callable[[int], object],
    flat: torch.nn.Parameter,
    optimizer: torch.optim.Optimizer,
    *,
    samples: int,
    blocks: int,
    sharing: int,
) -> Planner:
    """Return the planner of the run's steps; the others are as `Planner` takes them."""
    kind = (settings["optimizer"], settings["use_8bit_adam"], settings["use_ema"])
    return Planner(
        run,
        recompute_blocks,
        flat,
        optimizer,
        samples=samples,
        batch_size=settings["train_batch_size"],
        blocks=blocks,
        recompute=settings["gradient_checkpointing"],
        budget_gib=settings["vram_budget_gib"],
        sharing=sharing,
        update_bytes=optim.expected_update_bytes(flat.numel(), *kind),
        can_quantize=settings["base_quantization"] != "nf4",
    )


def make_optimizer(settings: Mapping, flat: torch.nn.Parameter, learning_rate: float) -> torch.optim.Optimizer:
    """Return the optimizer of the flat parameter."""
    betas = (settings["adam_beta1"], settings["adam_beta2"])
    options = (learning_rate, betas, settings["adam_weight_decay"], settings["adam_epsilon"])
    return optim.make_optimizer(flat, settings["optimizer"], settings["use_8bit_adam"], *options)

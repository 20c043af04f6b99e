"""Publish an adapter on the Hugging Face hub, with a model card."""

import logging
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

from rasengan import UserError, first_line
from rasengan.adapters import DIFFUSERS_FILE
from rasengan.command_line import is_token
from rasengan.files import write_atomically


logger = logging.getLogger(__name__)

TITLE = "# A LoRA for "
GRID_FILE = "validation.png"
RECIPE = (
    *("rank", "lora_alpha", "lora_target_modules", "train_text_encoder", "resolution", "optimizer_steps"),
    *(
        "train_batch_size",
        "gradient_accumulation_steps",
        "learning_rate",
        "lr_scheduler",
        "optimizer",
        "use_8bit_adam",
    ),
    *("use_ema", "prediction_type", "snr_gamma", "noise_offset", "mixed_precision", "base_quantization", "seed"),
)

# What the library raises where a gateway's page answers, or JSON of another kind.
NO_HUB = (KeyError, TypeError, ValueError)


def create_repository(name: str, token: str | None) -> str:
    """Return the id of a hub repository, made if missing.

    Args:
        name: of the repository.
        token: None takes the one of the environment, or of `hf auth login`.

    Raises:
        UserError: the hub cannot be reached, or refuses.
    """
    try:
        token = (token or get_token() or "").strip()
        if token and not is_token(token):  # what sends it would show it in the error
            raise UserError(
                "--push_to_hub: the token of --hub_token, HF_TOKEN or `hf auth login` holds what no token does, such "
                "as a space (it is not shown here). Copy it again."
            )
        return HfApi(token=token or None).create_repo(name, exist_ok=True).repo_id
    except (HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled, OSError, *NO_HUB) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"--push_to_hub: the hub refused {name}: {first_line(error).rstrip('.')}. Log in with `hf auth login`."
        ) from error


def upload(repo_id: str, token: str | None, directory: Path, with_grid: bool) -> None:
    """Upload both kinds of adapter and the model card.

    Args:
        repo_id: of the repository.
        token: None takes the one of the environment, or of `hf auth login`.
        directory: of the adapter.
        with_grid: the grid there too; it is this run's, not an earlier one's.

    Raises:
        UserError: the hub cannot be reached, or refuses; the files stay where they are.
    """
    patterns = [DIFFUSERS_FILE, "peft/*", "README.md", *[GRID_FILE] * with_grid]
    try:
        HfApi(token=token).upload_folder(repo_id=repo_id, folder_path=directory, allow_patterns=patterns)
    except (HTTPError, OSError, *NO_HUB) as error:
        raise UserError(
            f"--push_to_hub: the upload to {repo_id} failed: {first_line(error).rstrip('.')}. The adapter is in "
            f"{directory}; upload it with `hf upload {repo_id} {directory}`."
        ) from error


def write_model_card(directory: Path, settings: Mapping[str, object]) -> None:
    """Write `README.md` with the card of `model_card`; one that is not of this kind stays as it is.

    Args:
        directory: the adapter's, and the grid's where the run has drawn one.
        settings: of the run, by name, and its `optimizer_steps`.
    """
    file = directory / "README.md"
    if file.is_file() and f"\n{TITLE}" not in file.read_text(encoding="utf-8", errors="replace"):
        logger.warning("%s is no model card of this program: it stays, and no card is written", file)
        return
    base, prompts = settings["pretrained_model_name_or_path"], settings["validation_prompt"] or []
    base_model = None if base is None or Path(base).exists() else base
    dataset = settings["dataset_name"] or Path(settings["train_data_dir"]).resolve().name
    grid_file = GRID_FILE if prompts and (directory / GRID_FILE).is_file() else None
    write_atomically(file, model_card(base_model, dataset, prompts, grid_file, settings).encode())


def model_card(
    base_model: str | None, dataset: str, prompts: list[str], grid_file: str | None, settings: Mapping[str, object]
) -> str:
    """Return the README of a trained adapter: what it is, the grid, how to load it, and the recipe.

    Args:
        base_model: a hub id, or None for a local base.
        dataset: a name to show.
        prompts: of the grid.
        grid_file: the grid's name beside the card, or None.
        settings: of the run, by name; those of `RECIPE` are shown.
    """
    header = ["library_name: diffusers", "license: openrail++", "tags:"]
    header += [f"- {tag}" for tag in ("text-to-image", "stable-diffusion-xl", "diffusers", "lora", "peft")]
    if base_model:
        header.insert(0, f"base_model: {base_model}")
    grid = [f"![base and tuned pictures]({grid_file})", "", *[f"- {prompt}" for prompt in prompts], ""]
    rows = [f"| `{name}` | {settings[name]} |" for name in RECIPE]
    return "\n".join(
        [
            "---",
            *header,
            "---",
            "",
            f"{TITLE}{base_model or 'Stable Diffusion XL 1.0'}, trained on {dataset}",
            "",
            *(grid if grid_file else []),
            "```python",
            "pipeline.load_lora_weights('THIS_REPOSITORY')  # a StableDiffusionXLPipeline",
            "```",
            "",
            "Its alpha stands in the file's metadata, so diffusers applies it at the strength of the training.",
            "The folder `peft/` holds the same weights for `PeftModel.from_pretrained(pipeline.unet, ...)`.",
            "",
            "| setting | value |",
            "|---|---|",
            *rows,
            "",
        ]
    )

"""The recipe under a T4's limits: does it train and draw inside 14.3 GiB, and how much host memory does it take?

    python benchmarks/recipe.py

Full-size SDXL with random weights, 96 JPEG files, 512 px, batch 1, fp16, r = 16, alpha = 32, 8-bit AdamW, gradient
checkpointing, 100 steps; then infer.py at 512 and 1024 px, 4 pictures at once; then the same training with random
crops (the VAE in the loop), and with all encoders in the loop.
"""

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path

import full_size
import torch
from instrument import T4_BUDGET_GIB
from measure import ROOT, command_line, device_name, run, source_version, versions
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def what_training_left(output_dir: Path) -> dict:
    """Return how the losses and gradients went, from the TensorBoard log, and whether the adapter was trained."""
    events = EventAccumulator(str(output_dir / "logs" / "text2image-fine-tune"))
    events.Reload()
    losses, norms = ([e.value for e in events.Scalars(name)] for name in ("train_loss", "grad_norm"))
    weights = load_file(output_dir / "pytorch_lora_weights.safetensors")
    return {
        "losses": len(losses),
        "all_losses_finite": all(map(math.isfinite, losses)),
        "last_loss": losses[-1],
        "finite_grad_norms": sum(map(math.isfinite, norms)),
        "skipped_steps": events.Scalars("skipped_steps")[-1].value,
        "mean_abs_lora_B": sum(t.abs().mean().item() for k, t in weights.items() if "lora.up" in k)
        / (len(weights) / 2),
        "parameters": sum(tensor.numel() for tensor in weights.values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/recipe.json"))
    parser.add_argument("--logs", type=Path, help="where the runs' output goes [beside --out]")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--commit", help="of a copy without .git [git rev-parse HEAD]")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no GPU here, and the recipe is one for a T4")
    logs = args.logs or args.out.parent
    logs.mkdir(parents=True, exist_ok=True)
    result = {
        "gpu": device_name(),
        "versions": versions(),
        "commit": args.commit or source_version(ROOT),
        "command": command_line(),
        "budget_gib": T4_BUDGET_GIB,
        "runs": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        full_size.build(work / "base")
        full_size.draw_jpegs(work / "pictures")
        torch.cuda.empty_cache()
        launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
        launch += ["--config_file", "accelerate_configs/single_t4.yaml"]
        recipe = ["scripts/train_lora_sdxl.py", "--pretrained_model_name_or_path", f"{work}/base"]
        recipe += ["--train_data_dir", f"{work}/pictures", "--train_batch_size", "1", "--seed", "0"]
        recipe += ["--max_train_steps", str(args.steps), "--conditioning_cache_dir", f"{work}/cache"]
        recipe += ["--gradient_checkpointing", "--vram_budget_gib", str(T4_BUDGET_GIB)]
        draw = ["scripts/infer.py", "--pretrained_model_name_or_path", f"{work}/base", "--prompt", "a red star"]
        draw += ["--lora_weights", f"{work}/train", "--num_images_per_prompt", "4", "--num_inference_steps", "10"]
        runs = {
            "train": [*recipe, "--validation_prompt", "a red star", "--num_validation_images", "1"],
            "infer, 512 px, 4 at once": [*draw, "--height", "512", "--width", "512"],
            "infer, 1024 px, 4 at once": [*draw, "--height", "1024", "--width", "1024"],
            "train, random crops, the VAE in the loop": [*recipe, "--no-center_crop"],
            "train, all encoders in the loop": [*recipe, "--no-center_crop", "--no-cache_conditioning"],
        }
        for name, arguments in runs.items():
            slug = name.replace(",", "").replace(" ", "-")
            output, peaks = work / slug, work / f"{slug}.json"
            trains = name.startswith("train")
            start = launch if trains else [sys.executable]
            start = [*start, "benchmarks/instrument.py", "--as_t4", str(peaks)]
            found = run([*start, *arguments, "--output_dir", str(output)], logs / f"{slug}.log")
            if found["exit_code"] == 0:
                found |= json.loads(peaks.read_text())
                found |= what_training_left(output) if trains else {"pictures": len(list(output.glob("*.png")))}
            result["runs"][name] = found
            print(name, json.dumps(found), flush=True)
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

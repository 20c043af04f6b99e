"""The recipe under a T4's limits: does it train and draw inside 14.3 GiB, and how much host memory does it take?

    python benchmarks/recipe.py

Full-size SDXL with random weights, 96 JPEG files, 512 px, batch 1, fp16, r = 16, alpha = 32, 8-bit AdamW, gradient
checkpointing, 100 steps; then infer.py at 512 and 1024 px, 4 pictures at once; then the same training with random
crops (the VAE in the loop), and with all encoders in the loop.
"""

import argparse
import json
import math
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import accelerate
import bitsandbytes
import diffusers
import full_size
import peft
import torch
import transformers
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


ROOT = Path(__file__).parents[1]


def descendants(pid: int) -> list[int]:
    """Return a process and all that it started."""
    found = [pid]
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in children.read_text().split():
            found += descendants(int(child))
    return found


def host_memory_gib(pid: int) -> tuple[float, float]:
    """Return the largest RssAnon and RSS of a process and its descendants, in GiB."""
    anonymous, total = 0, 0
    for process in descendants(pid):
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
        kib = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "VmRSS"))}
        anonymous, total = max(anonymous, kib.get("RssAnon", 0)), max(total, kib.get("VmRSS", 0))
    return anonymous / 1024**2, total / 1024**2


def run(command: list[str], log: Path) -> dict:
    """Run a command, and return its exit code, duration and peaks of host memory, read from outside."""
    started, peak_anonymous, peak_rss = time.time(), 0.0, 0.0
    with open(log, "w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT)
        while process.poll() is None:
            try:
                anonymous, rss = host_memory_gib(process.pid)
                peak_anonymous, peak_rss = max(peak_anonymous, anonymous), max(peak_rss, rss)
            except (FileNotFoundError, ProcessLookupError):
                pass  # a process ended while it was looked at
            time.sleep(0.05)
    return {
        "exit_code": process.returncode,
        "wall_s": round(time.time() - started, 1),
        "host_peak_anonymous_gib": round(peak_anonymous, 2),
        "host_peak_rss_gib": round(peak_rss, 2),
    }


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


def commit() -> str:
    """Return the commit that is measured, marked where files differ from it."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
        changes = subprocess.run([*git, "status", "--porcelain"], check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        sys.exit("error: there is no git here to ask for the commit. Give it by --commit.")
    return f"{head} with changes" if changes.strip() else head


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/recipe.json"))
    parser.add_argument("--logs", type=Path, help="where the runs' output goes [beside --out]")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--commit", help="of a copy without .git [git rev-parse HEAD]")
    args = parser.parse_args()
    logs = args.logs or args.out.parent
    logs.mkdir(parents=True, exist_ok=True)
    result = {
        "gpu": torch.cuda.get_device_name(),
        "versions": {
            m.__name__: m.__version__ for m in (torch, diffusers, transformers, peft, accelerate, bitsandbytes)
        }
        | {"python": platform.python_version()},
        "commit": args.commit or commit(),
        "command": " ".join(["python", *sys.argv]),
        "budget_gib": 14.3,
        "runs": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        full_size.build(work / "base")
        full_size.draw_jpegs(work / "pictures")
        torch.cuda.empty_cache()
        launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
        launch += ["--config_file", "accelerate_configs/single_t4.yaml", "benchmarks/as_t4.py"]
        recipe = ["scripts/train_lora_sdxl.py", "--pretrained_model_name_or_path", f"{work}/base"]
        recipe += ["--train_data_dir", f"{work}/pictures", "--train_batch_size", "1", "--seed", "0"]
        recipe += ["--max_train_steps", str(args.steps), "--conditioning_cache_dir", f"{work}/cache"]
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
            start = launch if trains else [sys.executable, "benchmarks/as_t4.py"]
            found = run([*start, str(peaks), *arguments, "--output_dir", str(output)], logs / f"{slug}.log")
            if found["exit_code"] == 0:
                found |= json.loads(peaks.read_text())
                found |= what_training_left(output) if trains else {"pictures": len(list(output.glob("*.png")))}
            result["runs"][name] = found
            print(name, json.dumps(found), flush=True)
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""What does an update cost, beside the step that it follows?

    python benchmarks/optimizers.py

The full-size architecture, 512 px, batch 1, fp16, r = 16: the graph of forward and backward alone, and followed by the
finite check, the clipping and the update of each optimizer, through accelerate as in training. Prodigy takes no
overflow flag, so that the host waits for it once a step; that wait is part of its figure.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import full_size
import torch
from accelerate import Accelerator
from measure import ROOT, Results
from parity import SIZES, build, samples
from programs import exit_cleanly

from rasengan import UserError, optim


# name -> optimizer, 8-bit, running average
UPDATES = {
    "none": (None, False, False),
    "AdamW, fp32 state": ("adamw", False, False),
    "AdamW, 8-bit state": ("adamw", True, False),
    "AdamW, 8-bit state, running average": ("adamw", True, True),
    "Prodigy": ("prodigy", False, False),
}
WARM_UP, STEPS = 10, 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=ROOT / "benchmarks" / "results" / "optimizers.json", help="added to [%(default)s]")
    add("--base", type=Path, help="a full-size base, such as train_step.py leaves in --work_dir [built]")
    add("--commit", help="of this project, where there is no git")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise UserError("There is no GPU here, and the full size needs one.")
    results = Results(args.out, args.commit, {})
    with tempfile.TemporaryDirectory() as folder:
        base = args.base or Path(folder) / "base"
        if not base.exists():
            full_size.build(base)
        side, size, _, _ = SIZES["full size"]
        accelerator = Accelerator(mixed_precision="fp16")
        unet, flat, train_step, _ = build(base, "fused")
        train_step.backward = accelerator.backward
        batches = [samples(unet, number, size, side) for number in range(8)]
        for name, (optimizer_name, is_8bit, use_ema) in UPDATES.items():
            optimizer = ema = None
            if optimizer_name:
                rate = optim.LEARNING_RATES[optimizer_name]
                optimizer = optim.make_optimizer(flat, optimizer_name, is_8bit, rate, (0.9, 0.999), 1e-2, 1e-8)
                optimizer = accelerator.prepare(optimizer)
            if use_ema:
                ema = optim.make_ema(flat, 0.9999)
            times_ms = []
            for number in range(WARM_UP + STEPS):
                started = time.perf_counter()
                train_step(batches[number % len(batches)])
                if optimizer is not None:
                    accelerator.clip_grad_norm_([flat], 1.0)
                    optimizer.step()
                if ema is not None:
                    ema.step([flat])
                flat.grad.zero_()
                if number == WARM_UP - 1:
                    torch.cuda.synchronize()
                    began = time.perf_counter()
                times_ms.append(1e3 * (time.perf_counter() - started))
            torch.cuda.synchronize()
            found = {
                "step_ms": round(1e3 * (time.perf_counter() - began) / STEPS, 3),
                "host_ms_median": round(statistics.median(times_ms[WARM_UP:]), 3),
            }
            results.keep({"update": name, "steps": STEPS}, found)
            print(name, found, flush=True)
            accelerator._optimizers.clear()  # else the next clipping would unscale for this one too


if __name__ == "__main__":
    exit_cleanly(main)

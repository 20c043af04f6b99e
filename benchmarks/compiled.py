"""Would `torch.compile` make the training step faster than the fused kernels do?

    python benchmarks/compiled.py

Forward and backward as one CUDA graph, the full-size architecture with random weights, fp16, r = 16 on the four
projections: PEFT's forward under autocast, the same with diffusers' repeated blocks and the residual blocks compiled
("regional compilation", channels last), and the fused forward of this project. Needs Triton.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import full_size
import torch
from instrument import busy
from measure import ROOT, Results
from parity import build, samples
from programs import exit_cleanly
from torch.profiler import ProfilerActivity, profile

from rasengan import UserError, memory


# name -> side of the latents, batch size
CASES = {"512px b1": (64, 1), "512px b8": (64, 8), "1024px b4": (128, 4)}
WAYS = ("autocast", "autocast, compiled", "fused")
STEPS, PROFILED = 30, 3


def measure(base: Path, way: str, side: int, size: int) -> dict[str, float]:
    """Return what a step of one of WAYS takes, and the seconds until its first is done."""
    unet, flat, train_step, _ = build(base, way.removesuffix(", compiled"))
    if way.endswith("compiled"):
        unet.to(memory_format=torch.channels_last)
        unet._repeated_blocks = ["BasicTransformerBlock", "ResnetBlock2D"]
        unet.compile_repeated_blocks(dynamic=False)
    batch = samples(unet, 0, size, side)
    started = time.perf_counter()
    train_step(batch)
    torch.cuda.synchronize()
    first_s = time.perf_counter() - started
    times = [torch.cuda.Event(enable_timing=True) for _ in range(STEPS + 1)]
    for event in times:
        event.record()
        train_step(batch)
        flat.grad.zero_()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(PROFILED):
            train_step(batch)
        torch.cuda.synchronize()
    busy_ms, kernels = busy(profiled.events())
    found = {
        "step_ms": round(statistics.median(a.elapsed_time(b) for a, b in zip(times, times[1:], strict=False)), 2),
        "gpu_busy_ms": round(busy_ms / PROFILED, 2),
        "kernels": kernels // PROFILED,
        "first_step_s": round(first_s, 1),
        "peak_reserved_gib": round(memory.peak_reserved_gib(flat.device), 2),
    }
    train_step.release()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=ROOT / "benchmarks" / "results" / "compiled.json", help="added to [%(default)s]")
    add("--base", type=Path, help="a full-size base, such as train_step.py leaves in --work_dir [built]")
    add("--cases", nargs="+", choices=list(CASES), default=list(CASES), help="[all]")
    add("--commit", help="of this project, where there is no git")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise UserError("There is no GPU here, and CUDA graphs need one.")
    results = Results(args.out, args.commit, {})
    with tempfile.TemporaryDirectory() as folder:
        base = args.base or Path(folder) / "base"
        if not base.exists():
            full_size.build(base)
        for case in args.cases:
            for way in WAYS:
                torch.compiler.reset()
                memory.give_back()
                torch.cuda.reset_peak_memory_stats()
                found = measure(base, way, *CASES[case])
                results.keep({"case": case, "way": way, "steps": STEPS}, found)
                print(case, way, found, flush=True)


if __name__ == "__main__":
    exit_cleanly(main)

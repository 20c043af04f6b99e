"""Run a script that trains or draws, and write what its steps took into a JSON file.

    python benchmarks/instrument.py [--of drawing] [--profile_steps 3] [--as_t4] REPORT.json SCRIPT ARGUMENTS...

The script runs as it would by itself. A hook after each optimizer step, or each step of a sampler, records a CUDA
event and the host's clock; an optimizer step that the gradient scaler skips is not seen. Only --profile_steps slows
the script down.
"""

import argparse
import atexit
import json
import os
import runpy
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook


GIB = 1024**3
T4_BUDGET_GIB = 14.3
SAMPLERS = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler")


def seconds_since_start() -> float:
    """Return how long this process has lived, the interpreter's own start included."""
    with open("/proc/self/stat") as stat, open("/proc/uptime") as uptime:
        started_s = int(stat.read().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
        return float(uptime.read().split()[0]) - started_s


def busy(events) -> tuple[float, int]:
    """Return for how many ms the GPU had work, overlaps counted once, and the number of kernels and copies."""
    # A range that the host named shows on the GPU's side too, and is not work.
    work = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA and not e.is_user_annotation]
    total_us = until_us = 0.0
    for span in sorted((e.time_range for e in work), key=lambda span: span.start):
        total_us += max(0.0, span.end - max(span.start, until_us))
        until_us = max(until_us, span.end)
    return total_us / 1e3, len(work)


class Instrument:
    """What is recorded from the first optimizer step on."""

    def __init__(self, report: str, warm_up_steps: int, profile_steps: int, of: str = "training"):
        self.report, self.warm_up_steps, self.profile_steps = report, warm_up_steps, profile_steps
        self.cuda = torch.cuda.is_available()
        self.events, self.clocks_s = [], []
        self.found = {}
        self.peaks_bytes = {"peak_allocated": 0, "peak_reserved": 0}
        if self.cuda:
            # A script may start its own peak anew; the peak of everything is wanted here.
            self.reset_peaks = torch.cuda.reset_peak_memory_stats
            torch.cuda.reset_peak_memory_stats = self.note_and_reset_peaks
        if of == "training":
            register_optimizer_step_post_hook(self.step_done)
        else:
            self.watch_drawing()
        atexit.register(self.finish)

    def watch_drawing(self) -> None:
        """Take the sampler's steps for the optimizer's, and note when the first picture is saved."""
        import diffusers
        from PIL import Image

        def noting(step):
            def step_and_note(*inputs, **options):
                result = step(*inputs, **options)
                self.step_done()
                return result

            return step_and_note

        save = Image.Image.save

        def save_and_note(*inputs, **options):
            save(*inputs, **options)
            self.found.setdefault("first_picture_s", round(seconds_since_start(), 2))

        samplers = [getattr(diffusers, name) for name in SAMPLERS]
        if Path(sys.argv[0]).name == "infer.py":
            from rasengan.drawing import LinearSampler  # by which ours takes UniPC's steps

            samplers.append(LinearSampler)
        for sampler in samplers:
            sampler.step = noting(sampler.step)
        Image.Image.save = save_and_note

    def note_and_reset_peaks(self, device=None) -> None:
        """Keep the peaks so far, of all and of the loop, and start them anew."""
        now = {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
        for kind, value in now.items():
            self.peaks_bytes[f"peak_{kind}"] = max(self.peaks_bytes[f"peak_{kind}"], value)
            if self.events:
                name = f"loop_peak_{kind}"
                self.peaks_bytes[name] = max(self.peaks_bytes.get(name, 0), value)
        self.reset_peaks(device)

    def step_done(self, *_) -> None:
        """Record the end of an optimizer step, and begin or end the profile where it is due."""
        first = not self.clocks_s
        if self.cuda:
            if first:
                torch.cuda.synchronize()
                self.note_and_reset_peaks()
            self.events.append(torch.cuda.Event(enable_timing=True))
            self.events[-1].record()
        self.clocks_s.append(time.perf_counter())
        if first:
            self.found["first_step_s"] = round(seconds_since_start(), 2)
        steps = len(self.clocks_s)
        if self.cuda and self.profile_steps:
            if steps == 2 * self.warm_up_steps:
                torch.cuda.synchronize()
                self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
                self.profiler.start()
            elif steps == 2 * self.warm_up_steps + self.profile_steps:
                torch.cuda.synchronize()
                self.profiler.stop()
                busy_ms, kernels = busy(self.profiler.events())
                self.found["gpu_busy_ms"] = round(busy_ms / self.profile_steps, 2)
                self.found["kernels"] = round(kernels / self.profile_steps)

    def finish(self) -> None:
        """Write the report."""
        found, first, last = self.found, self.warm_up_steps, len(self.clocks_s)
        found["optimizer_steps"] = last
        if self.profile_steps:
            last = min(last, 2 * self.warm_up_steps)
        if self.cuda:
            torch.cuda.synchronize()
            self.note_and_reset_peaks()
            found |= {f"{name}_gib": round(value / GIB, 3) for name, value in self.peaks_bytes.items()}
            spans = [self.events[k].elapsed_time(self.events[k + 1]) for k in range(first, last - 1)]
        else:
            spans = [1e3 * (self.clocks_s[k + 1] - self.clocks_s[k]) for k in range(first, last - 1)]
        if spans:
            found["step_ms_median"] = round(statistics.median(spans), 2)
            found["step_ms_mean"] = round(1e3 * (self.clocks_s[last - 1] - self.clocks_s[first]) / len(spans), 2)
        with open(self.report, "w") as out:
            json.dump(found, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--warm_up_steps", type=int, default=5, help="steps not timed [%(default)s]")
    add("--profile_steps", type=int, default=0, help="profile so many, after twice the warm-up, and time none later")
    add("--memory_cap_gib", type=float, help="fail like a card that has no more")
    add("--no_flash_attention", action="store_true", help="as on cards before Ampere")
    add("--as_t4", action="store_true", help=f"both: {T4_BUDGET_GIB} GiB, and no flash attention")
    add("--of", choices=["training", "drawing"], default="training", help="whose steps [%(default)s]")
    add("report", help="the JSON file to write")
    add("script", help="what to run")
    add("arguments", nargs=argparse.REMAINDER, help="the script's own")
    args = parser.parse_args()
    command = [args.script, *args.arguments]
    cap_gib = args.memory_cap_gib or (T4_BUDGET_GIB if args.as_t4 else None)
    if cap_gib and torch.cuda.is_available():
        total_bytes = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap_gib * GIB / total_bytes))
    if args.no_flash_attention or args.as_t4:
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.enable_cudnn_sdp(False)
    sys.argv = command
    sys.path[0] = os.path.dirname(os.path.abspath(command[0]))  # where python would have put the script's folder
    Instrument(os.path.abspath(args.report), args.warm_up_steps, args.profile_steps, args.of)
    runpy.run_path(command[0], run_name="__main__")


if __name__ == "__main__":
    main()

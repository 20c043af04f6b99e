"""Does a long run leak? 20,000 steps of the tiny SDXL with checkpoints, rotation and validation, seen from outside.

    python benchmarks/soak.py [--steps 20000]

Memory, open files and threads of the process are read every ten seconds; what they grew by is fitted from a tenth of
the run on, when everything has been used once. The TensorBoard file must hold every step in the end.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from measure import ROOT, Results
from programs import exit_cleanly
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rasengan import UserError, demo


# What a run may grow by from a tenth of it on; its TensorBoard events and log lines are on the disk.
MOST_GROWN = {"rss_mib": 50, "anonymous_mib": 50, "threads": 0.5, "open_files": 0.5}


def look(pid: int) -> dict[str, float]:
    """Return a process's memory in MiB, open files and threads."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    values = {
        line.split(":")[0]: line.split()[1] for line in lines if line.startswith(("VmRSS", "RssAnon", "Threads"))
    }
    return {
        "rss_mib": int(values["VmRSS"]) / 1024,
        "anonymous_mib": int(values["RssAnon"]) / 1024,
        "threads": int(values["Threads"]),
        "open_files": len(os.listdir(f"/proc/{pid}/fd")),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--steps", type=int, default=20000, help="[%(default)s]")
    add("--out", type=Path, default=ROOT / "benchmarks" / "results" / "soak.json", help="added to [%(default)s]")
    add("--commit", help="of this project, where there is no git")
    args = parser.parse_args()
    results = Results(args.out, args.commit, {})
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        demo.build_tiny_sdxl(work / "base")
        demo.draw_picture_set(work / "set")
        command = [sys.executable, str(ROOT / "scripts" / "train_lora_sdxl.py")]
        command += ["--pretrained_model_name_or_path", f"{work}/base", "--train_data_dir", f"{work}/set"]
        command += [
            "--resolution",
            "64",
            "--train_batch_size",
            "1",
            "--seed",
            "0",
            "--max_train_steps",
            str(args.steps),
        ]
        command += ["--checkpointing_steps", "100", "--checkpoints_total_limit", "2", "--use_ema"]
        command += ["--validation_prompt", "a red star", "--num_validation_images", "1", "--validation_epochs", "10"]
        command += ["--validation_inference_steps", "2", "--output_dir", f"{work}/run"]
        command += ["--conditioning_cache_dir", f"{work}/cache"]
        seen = []
        with open(work / "log", "w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
            began_s = time.monotonic()
            while process.poll() is None:
                time.sleep(min(10, args.steps / 100))
                if process.poll() is None:
                    seen.append({"seconds": round(time.monotonic() - began_s, 1)} | look(process.pid))
        if process.returncode:
            raise UserError(f"The run ended with {process.returncode}: {(work / 'log').read_text()[-2000:]}")
        events = EventAccumulator(f"{work}/run/logs/text2image-fine-tune", size_guidance={"scalars": 0})
        events.Reload()
        losses = events.Scalars("train_loss")
        checkpoints = sorted(path.name for path in (work / "run").glob("checkpoint-*"))
    steady = seen[len(seen) // 10 :]
    seconds = [row["seconds"] for row in steady]
    grown = {
        name: round(float(np.polyfit(seconds, [row[name] for row in steady], 1)[0]) * (seconds[-1] - seconds[0]), 2)
        for name in ("rss_mib", "anonymous_mib", "threads", "open_files")
    }
    found = {"steps": args.steps, "losses": len({event.step for event in losses}), "checkpoints": checkpoints}
    found |= {"grown": grown, "first": steady[0], "last": steady[-1], "readings": len(seen)}
    results.keep({"run": "soak"}, found)
    print(found)
    too_much = [name for name, most in MOST_GROWN.items() if grown[name] > most]
    if too_much or found["losses"] != args.steps:
        raise UserError(f"The run leaks ({', '.join(too_much) or 'nothing'}) or lost losses: see {args.out}.")


if __name__ == "__main__":
    exit_cleanly(main)

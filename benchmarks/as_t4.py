"""Run a script on a large GPU as a Tesla T4 would have to: 14.3 GiB at most, and no flash attention.

    accelerate launch ... benchmarks/as_t4.py REPORT.json SCRIPT ARGUMENTS...

Writes the peaks of the GPU's memory into REPORT.json when the script ends.
"""

import atexit
import json
import runpy
import sys

import torch


BUDGET_GIB = 14.3
GIB = 1024**3


def report(file: str) -> None:
    """Write the peaks over the whole run."""
    peaks = {
        "peak_allocated_gib": round(torch.cuda.max_memory_allocated() / GIB, 3),
        "peak_reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 3),
    }
    with open(file, "w") as out:
        json.dump(peaks, out)


if __name__ == "__main__":
    _, report_file, script, *arguments = sys.argv
    torch.cuda.set_per_process_memory_fraction(BUDGET_GIB * GIB / torch.cuda.get_device_properties(0).total_memory)
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)
    # The script measures the peak of its own loop; here the peak of everything is wanted.
    torch.cuda.reset_peak_memory_stats = lambda *_: None
    atexit.register(report, report_file)
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")

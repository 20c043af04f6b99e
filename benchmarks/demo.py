"""How long does the demo take?

    python benchmarks/demo.py

`make demo` whole, in a folder of its own, with the environment already installed.
"""

import argparse
import os
import tempfile
from pathlib import Path

from measure import ROOT, Results, run
from programs import exit_cleanly

from rasengan import UserError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=ROOT / "benchmarks" / "results" / "demo.json", help="added to [%(default)s]")
    args = parser.parse_args()
    results = Results(args.out, None, {})
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.txt"
        found = run(["make", "demo", f"DEMO={folder}/demo"], log)
        if found["exit_code"]:
            raise UserError(f"make demo failed: {log.read_text()[-2000:]}")
    results.keep({"run": "make demo", "cores": len(os.sched_getaffinity(0))}, found)
    print(f"{found['wall_s']:.0f} s")


if __name__ == "__main__":
    exit_cleanly(main)

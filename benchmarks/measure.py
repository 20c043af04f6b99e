"""What the benchmarks share: run a command watched from outside, say what it ran on, keep every result."""

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from rasengan import UserError, first_line
from rasengan.files import write_atomically


ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "bitsandbytes")


# --- run and watch ---


def as_installed() -> dict[str, str]:
    """Return this environment, in which Python keeps the bytecode of what it imports, whatever the packages came with.

    A machine whose packages have none, and that keeps none, compiles them in every start, which takes longer than all
    else there.
    """
    kept = str(Path(tempfile.gettempdir()) / "rasengan-benchmarks-bytecode")
    environment = {"PYTHONPYCACHEPREFIX": kept} | os.environ
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    return environment


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


def run(command: list[str], log: Path, cwd: Path = ROOT, environment: dict[str, str] | None = None) -> dict:
    """Run a command, and return its exit code, duration and peaks of host memory, read from outside.

    A command that fails also leaves the last line of its log in the result.
    """
    peak_anonymous, peak_rss = 0.0, 0.0
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w") as out:
        started = time.perf_counter()
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, cwd=cwd, env=as_installed() | (environment or {})
        )
        while process.poll() is None:
            try:
                anonymous, rss = host_memory_gib(process.pid)
                peak_anonymous, peak_rss = max(peak_anonymous, anonymous), max(peak_rss, rss)
            except (FileNotFoundError, ProcessLookupError):
                pass  # a process ended while it was looked at
            time.sleep(0.05)
        wall_s = time.perf_counter() - started
    found = {
        "exit_code": process.returncode,
        "wall_s": round(wall_s, 2),
        "host_peak_anonymous_gib": round(peak_anonymous, 2),
        "host_peak_rss_gib": round(peak_rss, 2),
    }
    if process.returncode:
        lines = log.read_text(errors="replace").strip().splitlines()
        found["error"] = lines[-1][:300] if lines else "it said nothing"
    return found


def run_instrumented(command: list[str], log: Path, options: list[str] = (), **how) -> dict:
    """Run a training script under instrument.py, and return what was read from outside and from inside.

    Args:
        command: the script and its arguments, without the interpreter.
        log: where its output goes.
        options: of instrument.py.
        how: `cwd` and `environment` of `run`.
    """
    report = log.with_suffix(".json")
    report.unlink(missing_ok=True)
    instrument = [sys.executable, str(ROOT / "benchmarks" / "instrument.py"), *options, str(report)]
    found = run([*instrument, *command], log, **how)
    if report.exists():
        found |= json.loads(report.read_text())
        report.unlink()
    return found


def outside_ms(short: dict, long: dict) -> float | None:
    """Return the wall time of a step: what the longer of two whole runs took more, by the steps that it did more.

    Each counts from its first step's end until its process's: starts, of ten seconds and more, differ by more than
    some steps take. None where the runs do not tell it: a step takes no less from outside than inside, but for 2 %, by
    which the few steps of a short run are slower.

    Args:
        short: what `run_instrumented` returned, and its `steps`.
        long: likewise.
    """
    if not all({"wall_s", "first_step_s", "steps", "step_ms_median"} <= found.keys() for found in (short, long)):
        return None
    more_s = (long["wall_s"] - long["first_step_s"]) - (short["wall_s"] - short["first_step_s"])
    found_ms = 1e3 * more_s / (long["steps"] - short["steps"])
    return found_ms if found_ms >= 0.98 * long["step_ms_median"] else None


# --- say what it ran on ---


def device_name() -> str:
    """Return the GPU's name, or "CPU"."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide the speed."""
    return {name: importlib.metadata.version(name) for name in PACKAGES} | {"python": platform.python_version()}


def source_version(folder: Path) -> str:
    """Return the commit of a checkout, or what its file COMMIT says, or "unknown"."""
    if (folder / ".git").exists():
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True)
        return found.stdout.strip() or "unknown"
    named = folder / "COMMIT"
    return named.read_text().strip() if named.exists() else "unknown"


def command_line() -> str:
    """Return this command as it was typed, but with the last part alone of each absolute path."""
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    return shlex.join(["python", str(Path(sys.argv[0]).resolve().relative_to(ROOT)), *words])


# --- keep every result ---


def read_results(file: Path) -> dict:
    """Return what a file of `Results` holds.

    Raises:
        UserError: it is none.
    """
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as results: {first_line(error)}. Give another file.") from error
    if not isinstance(found, dict) or not {"device", "versions", "invocations", "runs"} <= found.keys():
        raise UserError(f"{file} holds no results of a benchmark. Give another file.")
    return found


class Results:
    """A JSON file that is written after every run, and to which later commands on the same card add.

    `data["invocations"]` lists the commands, each with this project's commit; each of `data["runs"]` names the one it
    came from, by its place there.
    """

    def __init__(self, file: Path, commit: str | None, peers: dict[str, Path]):
        """Open or begin the file.

        Raises:
            UserError: it holds no results, or those of another card or set of versions.
        """
        self.file = file
        header = {"device": device_name(), "versions": versions()}
        self.data = header | {"peers": {}, "invocations": [], "runs": []}
        if file.exists():
            old = read_results(file)
            for name, value in header.items():
                if old.get(name) != value:
                    raise UserError(f"--out {file} has {name} {old.get(name)}, not {value}: give another --out.")
            self.data = old
        self.data["peers"] |= {name: source_version(folder) for name, folder in peers.items()}
        self.data["invocations"].append({"command": command_line(), "commit": commit or source_version(ROOT)})
        self.invocation = len(self.data["invocations"])

    def keep(self, names: dict[str, str], found: dict) -> None:
        """Add a run, by its names, in the place of what this command kept of it before, and write the file."""
        names = {"invocation": self.invocation} | names
        self.data["runs"] = [run for run in self.data["runs"] if not names.items() <= run.items()]
        self.data["runs"].append(names | found)
        write_atomically(self.file, (json.dumps(self.data, indent=2) + "\n").encode())

    def latest(self, names: dict[str, str]) -> dict:
        """Return the last run of these names, or nothing."""
        return next((run for run in reversed(self.data["runs"]) if names.items() <= run.items()), {})

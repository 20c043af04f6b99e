"""Is nothing lost? Kill a run at random moments, fill its disk, resume it, and compare what it leaves bit for bit.

    python benchmarks/faults.py [--kills 200] [--processes 1 2] [--disk_sizes 40] [--shrinks 40]

The tiny SDXL on the CPU, 12 steps, a checkpoint every second step, two kept. A run is killed (SIGKILL) up to six
times, at moments drawn over its whole length, cache and export included, and resumed each time; of two processes
sometimes one alone is killed. Then the adapter, the last checkpoint and the logged losses must be those of a run that
nobody disturbed, and the newest checkpoint must have been whole after every kill.

A disk is filled in two ways, for which root mounts small file systems. On some of growing sizes a run must end well,
or say what is full, and keep its checkpoints; a checkpoint is the largest thing it writes, so little else meets the
end of those. Others shrink under a run to what they hold, at moments drawn over all that it writes, so that its next
write fails, whichever it is; after they have grown again, the run must go on to the same bits.
"""

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from measure import ROOT, Results
from programs import exit_cleanly
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader


STEPS, FULL_SIZE_STEPS = 12, 240  # a graph's steps are short beside the start of a process
GPU_MODE = ("--deterministic", "--cuda_graph")
MOST_KILLS = 6  # of one run
# When one of a run's processes has ended badly, `accelerate launch` ends the others, so patiently.
TERMINATE_AFTER_S, KILL_AFTER_S = 5, 35
# Import everything, wait for the arguments of a run, and begin.
WAIT = """
import json, os, sys, faults
script = faults.load_script()
print("ready", flush=True)
begin = json.loads(sys.stdin.readline() or "null")
if begin:
    out = os.open(begin["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.exit(script.run(begin["words"]))
"""
ADAPTER = "pytorch_lora_weights.safetensors"
LOGGED = {"train_loss", "grad_norm", "validation_loss"}
# Of a run whose disk shrinks: best/ and validation.png are written too, in the loop and at the end. An epoch of 28
# pictures less the held-out ones has 6 steps.
MORE_WRITES = ("--max_train_samples", "28", "--validation_split", "4", "--validation_loss_steps", "3", "--save_best")
MORE_WRITES += ("--validation_prompt", "a star", "--num_validation_images", "1", "--validation_inference_steps", "2")
LARGE_BYTES = 2**28  # far more than a run of the tiny model writes
MOST_WAIT_S = 0.05  # from a write to the shrinking
PLACE_FLAGS = "--output_dir or --conditioning_cache_dir"


@dataclass
class Faults:
    """Runs of the training script, forked from this process on a CPU, since it has imported everything already."""

    work: Path
    script: object
    processes: int
    on_gpu: bool = False
    waiting: subprocess.Popen | None = None

    @property
    def steps(self) -> int:
        """Of a whole run."""
        return FULL_SIZE_STEPS if self.on_gpu else STEPS

    # --- runs ---

    def start(
        self, output_dir: Path, cache_dir: Path, log: Path, last_step: int | None = None, more: Iterable[str] = ()
    ) -> list[int]:
        """Start a run, fresh or resumed, with more flags or none, and return the numbers of its processes."""
        words = [
            "--pretrained_model_name_or_path",
            str(self.work / "base"),
            "--train_data_dir",
            str(self.work / "set"),
        ]
        words += [
            "--seed",
            "0",
            "--max_train_steps",
            str(last_step or self.steps),
            "--checkpointing_steps",
            str(self.steps // 6),
            "--logging_steps",
            "3",
        ]
        words += ["--checkpoints_total_limit", "2", "--resume_from_checkpoint", "latest", "--learning_rate", "1e-3"]
        words += ["--output_dir", str(output_dir), "--conditioning_cache_dir", str(cache_dir), *more]
        if self.on_gpu:
            words += ["--resolution", "512", "--train_batch_size", "1", "--mixed_precision", "fp16", *GPU_MODE]
            return [self._start_waiting(words, log)]
        words += ["--resolution", "64", "--train_batch_size", str(4 // self.processes)]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        return [self._fork(words, rank, port, log) for rank in range(self.processes)]

    def _start_waiting(self, words: list[str], log: Path) -> int:
        """Let the process that has imported everything begin, and start the next one, which imports meanwhile.

        One that has touched the card cannot be forked.
        """
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "cwd": Path(__file__).parent}
        begun = self.waiting or subprocess.Popen([sys.executable, "-c", WAIT], **pipes)
        self.waiting = subprocess.Popen([sys.executable, "-c", WAIT], **pipes)
        begun.stdout.readline()  # that it is ready
        begun.stdin.write(json.dumps({"words": words, "log": str(log)}).encode() + b"\n")
        begun.stdin.close()
        return begun.pid

    def close(self) -> None:
        """End the process that waits."""
        if self.waiting is not None:
            self.waiting.kill()
            self.waiting.wait()

    def _fork(self, words: list[str], rank: int, port: int, log: Path) -> int:
        child = os.fork()
        if child:
            return child
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        if self.processes > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self.processes)}
            os.environ |= {"LOCAL_WORLD_SIZE": str(self.processes), "MASTER_ADDR": "127.0.0.1"}
            os.environ |= {"MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true", "ACCELERATE_MIXED_PRECISION": "no"}
        code = 1
        try:
            code = self.script.run(words)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def finish(self, pids: list[int], limit_s: float = 300) -> list[int]:
        """Wait for the processes as a launcher does, and return how each ended.

        Raises:
            RuntimeError: they did not end in time.
        """
        codes, until_s, failed_s = {}, time.monotonic() + limit_s, None
        while len(codes) < len(pids):
            for pid in set(pids) - codes.keys():
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[pid] = os.waitstatus_to_exitcode(status)
            now_s = time.monotonic()
            if any(codes.values()):
                failed_s = failed_s or now_s
                if now_s - failed_s > TERMINATE_AFTER_S:
                    late = now_s - failed_s > KILL_AFTER_S
                    self.send(signal.SIGKILL if late else signal.SIGTERM, set(pids) - codes.keys())
            if now_s > until_s:
                self.send(signal.SIGKILL, set(pids) - codes.keys())
                raise RuntimeError(f"processes {pids} did not end within {limit_s} s")
            time.sleep(0.01)
        return [codes[pid] for pid in pids]

    def send(self, number: signal.Signals, pids: Iterable[int]) -> None:
        """Send a signal to those of the processes that are still there."""
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    # --- trials ---

    def marks(self, output_dir: Path) -> dict[str, int]:
        """Return what a run leaves on the disk while it is at something, each with its number on the file system."""
        found = {"args.json": output_dir / "args.json"} | {path.name: path for path in output_dir.glob(".*")}
        return {name: path.stat().st_ino for name, path in found.items() if path.exists()}

    def where(self, output_dir: Path, cache_dir: Path, before: dict[str, int], shards: int) -> str:
        """Return what a run is at, from what is new on the disk since it started."""
        new = [name for name, number in self.marks(output_dir).items() if before.get(name) != number]
        for mark, phase in ((".removing", "rotation"), (".saving", "writing a checkpoint"), (".export", "export")):
            if any(name.startswith(mark) for name in new):
                return phase
        if "args.json" in new:
            return "loop or the end"
        cached = sum(1 for _ in cache_dir.rglob("*.safetensors"))
        return "building the cache" if shards < cached < 2 else "before the loop"

    def newest_step(self, output_dir: Path) -> int:
        """Return the step of the newest checkpoint, 0 for none.

        Raises:
            RuntimeError: it is not whole.
        """
        there = self.script.checkpoint.list_checkpoints(output_dir)
        if not there:
            return 0
        if damage := self.script.checkpoint.find_damage(there[-1]):
            raise RuntimeError(f"{there[-1]} is not whole: {damage}")
        return int(there[-1].name.split("-")[1])

    def trial(self, folder: Path, draw: random.Random, length_s: float, fresh_cache: bool) -> tuple[Counter, Path]:
        """Run until the end through several kills, and return where they hit, and the run's folder."""
        output_dir, log = folder / "run", folder / "log"
        cache_dir = folder / "cache" if fresh_cache else self.work / "cache"
        hit = Counter()
        while True:
            newest, before = self.newest_step(output_dir), self.marks(output_dir)
            shards = sum(1 for _ in cache_dir.rglob("*.safetensors"))
            pids = self.start(output_dir, cache_dir, log)
            if sum(hit.values()) < MOST_KILLS:
                time.sleep(draw.uniform(0, length_s))
                phase = self.where(output_dir, cache_dir, before, shards)
                alone = self.processes > 1 and draw.random() < 0.5
                self.send(signal.SIGKILL, [draw.choice(pids)] if alone else pids)
                codes = self.finish(pids)
                if -signal.SIGKILL in codes:
                    hit[phase + (", one of two" if alone else "")] += 1
                    if self.newest_step(output_dir) < newest:
                        raise RuntimeError(f"{output_dir} had checkpoint-{newest}, and lost it by a kill at: {phase}")
                    continue
            else:
                codes = self.finish(pids)
            if codes != [0] * self.processes:
                raise RuntimeError(f"a run ended with {codes}: {log.read_text()[-3000:]}")
            return hit, output_dir


def contents(output_dir: Path, steps: int) -> dict[str, bytes]:
    """Return what must be equal, as its bytes, by name.

    That is the adapter, and the best one and the pictures where there are any; the last checkpoint's adapter and
    optimizer; and what was logged of each step.

    Raises:
        RuntimeError: the optimizer has no tensors, or the loss of a step is nowhere in the log.
    """
    last = output_dir / f"checkpoint-{steps}"
    state = torch.load(last / "optimizer.bin", weights_only=True, map_location="cpu")["state"][0]
    state |= state.pop("__bnb_optimizer_quant_state__", {})  # where bitsandbytes keeps its tensors
    tensors = {name: value.numpy().tobytes() for name, value in state.items() if torch.is_tensor(value)}
    if not tensors:
        raise RuntimeError(f"{last / 'optimizer.bin'} has no tensors to compare")
    files = {"adapter": output_dir / ADAPTER, "last": last / ADAPTER, "best": output_dir / "best" / ADAPTER}
    files |= {"pictures": output_dir / "validation.png"}
    found = {name: file.read_bytes() for name, file in files.items() if file.is_file()}
    # A log is on the disk before the checkpoint of its steps is begun, so no kill and no full disk may lose any.
    logged = logged_values(output_dir / "logs")
    if missing := [step for step in range(1, steps + 1) if named("train_loss", step) not in logged]:
        raise RuntimeError(f"{output_dir / 'logs'} has no train_loss of the steps {missing}")
    return tensors | found | logged


def logged_values(folder: Path) -> dict[str, bytes]:
    """Return what a run's event files say of each step, the last that any of them says of it, as float32's bytes.

    A run that was killed logs some steps again when it is resumed. The file of one that was killed may end anywhere.
    """
    found = {}
    for file in sorted(folder.rglob("events.out.tfevents.*")):
        for event in LegacyEventFileLoader(str(file)).Load():
            for value in event.summary.value:
                if value.tag.split("/")[0] in LOGGED:
                    found.setdefault(named(value.tag, event.step), []).append((event.wall_time, value.simple_value))
    # The names of the files have whole seconds only. Of equal times the later in the files counts.
    return {name: struct.pack("<f", sorted(of, key=lambda known: known[0])[-1][1]) for name, of in found.items()}


def named(tag: str, step: int) -> str:
    return f"{tag} of step {step}"


def differences(expected: dict[str, bytes], found: dict[str, bytes]) -> list[str]:
    """Return the names of `contents` under which two runs differ, or which one of them lacks."""
    return [name for name in expected | found if expected.get(name) != found.get(name)]


def load_script():
    """Return scripts/train_lora_sdxl.py, imported."""
    import importlib.util

    file = ROOT / "scripts" / "train_lora_sdxl.py"
    spec = importlib.util.spec_from_file_location(file.stem, file)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    return script


def kill_at_random(faults: Faults, kills: int, seed: int, results: Results) -> None:
    """Kill runs so often, and keep what came of it.

    Raises:
        RuntimeError: something was lost.
    """
    expected = {}
    for number in range(2):  # the first builds the cache, and reads cold files
        folder = faults.work / f"undisturbed-{faults.processes}-{number}"
        folder.mkdir()
        pids = faults.start(folder / "run", faults.work / "cache", folder / "log")
        began_s = time.monotonic()  # the moments of the kills count from here too
        codes = faults.finish(pids)
        length_s = time.monotonic() - began_s
        if any(codes):
            raise RuntimeError(f"the undisturbed run ended with {codes}: {(folder / 'log').read_text()[-3000:]}")
        found = contents(folder / "run", faults.steps)
        if expected and (different := differences(expected, found)):
            raise RuntimeError(f"of two undisturbed runs, {', '.join(different)} differ")
        if faults.on_gpu and "run without" in (folder / "log").read_text():
            raise RuntimeError(f"steps ran without a CUDA graph: {(folder / 'log').read_text()[-3000:]}")
        expected = found
    draw, hits, runs, equal = random.Random(seed), Counter(), 0, 0
    losses, losses_equal = [name for name in expected if " of step " in name], 0
    names = {"fault": "SIGKILL", "processes": faults.processes, "size": "full" if faults.on_gpu else "tiny"}
    names |= {"mode": " ".join(GPU_MODE)} if faults.on_gpu else {}
    while sum(hits.values()) < kills:
        folder = faults.work / "trial"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        hit, output_dir = faults.trial(folder, draw, length_s, fresh_cache=runs % 3 == 0)
        found = contents(output_dir, faults.steps)
        different = differences(expected, found)
        hits, runs, equal = hits + hit, runs + 1, equal + (not different)
        losses_equal += len(set(losses) - set(different))
        counts = {"asked": kills, "kills": sum(hits.values()), "runs": runs, "equal": equal}
        counts |= {"losses_equal": f"{losses_equal} of {runs * len(losses)}"}
        results.keep(names, counts | {"where": dict(hits.most_common())})
        if different:
            raise RuntimeError(f"after kills at {dict(hit)}, {', '.join(different)} differ; see {folder}")
        print(f"{sum(hits.values())} kills, {runs} runs, all equal to the undisturbed one", flush=True)


def fill_the_disk(faults: Faults, sizes: int, results: Results) -> None:
    """Run on file systems of growing size, and keep what came of it: a run that goes on, and one from the first byte.

    Raises:
        RuntimeError: a run ended otherwise than by saying what is full, or lost a checkpoint.
    """
    begun, whole = faults.work / "begun", faults.work / "whole"
    for folder, last_step in ((begun, 4), (whole, None)):
        log = folder.with_suffix(".log")
        (code,) = faults.finish(faults.start(folder / "run", folder / "cache", log, last_step=last_step))
        if code:
            raise RuntimeError(f"a run on the whole disk ended with {code}: {log.read_text()[-3000:]}")
    begun_bytes, whole_bytes = (
        sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) for folder in (begun, whole)
    )
    # From what there is already, or nothing, to more than is needed: three checkpoints are there for a moment.
    for name, source, least, largest in (
        ("a full disk, going on", begun, 1.01 * begun_bytes + 2**18, 1.7 * begun_bytes),
        ("a full disk, from the start", None, 2**16, 1.6 * whole_bytes),
    ):
        said = Counter()
        for number in range(sizes):
            size = int(least + (largest - least) * number / sizes) // 4096 * 4096
            said[run_on_small_disk(faults, size, source)] += 1
        found = {"sizes": sizes, "ended": dict(said.most_common())}
        results.keep({"fault": name, "processes": 1}, found)
        print(name, json.dumps(found), flush=True)


def run_on_small_disk(faults: Faults, size_bytes: int, begun: Path | None) -> str:
    """Run, or go on with a copy of a run, on a file system of its own; return what was full, or that it finished.

    Raises:
        RuntimeError: it ended otherwise than by saying what is full, or lost a checkpoint.
    """
    log = faults.work / "disk.log"
    log.unlink(missing_ok=True)
    with own_file_system(faults, size_bytes) as mount:
        if begun:
            shutil.copytree(begun, mount, dirs_exist_ok=True)
        before = faults.newest_step(mount / "run")
        (code,) = faults.finish(faults.start(mount / "run", mount / "cache", log))
        text = log.read_text(errors="replace")
        if code not in {0, 2} or "Traceback" in text:
            raise RuntimeError(f"on a disk of {size_bytes} bytes a run ended with {code}: {text[-3000:]}")
        if faults.newest_step(mount / "run") < before:
            raise RuntimeError(f"on a disk of {size_bytes} bytes a run lost its checkpoints: {text[-3000:]}")
        if code == 0:
            return "finished"
        error = text[text.index("error: ") :]
        place = named_place(error, mount)
        if "No space left on device" not in error or not place:
            raise RuntimeError(f"on a disk of {size_bytes} bytes a run did not say which is full: {text[-3000:]}")
        needs = "needs and free said" if "are free there" in error else "no needs said"
        return f"full at {place}, {needs}"


@contextlib.contextmanager
def own_file_system(faults: Faults, size_bytes: int) -> Iterator[Path]:
    """Mount a file system of this size for a while, and give its folder."""
    mount = faults.work / "disk"
    mount.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(mount)], check=True)
    try:
        yield mount
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def named_place(error: str, mount: Path) -> str | None:
    """Return which place on a file system an error names first, without what differs from run to run; None if none."""
    place = re.search(re.escape(str(mount)) + r"(/[^ :]*)?", error)
    if place is None:
        return None
    return re.sub(r"[0-9a-f]{16,}[^/]*|\d+", "N", place[0].removeprefix(str(mount)).rstrip(".")) or "the mount"


# --- a disk that shrinks ---


def shrink_the_disk(faults: Faults, shrinks: int, seed: int, results: Results) -> None:
    """Shrink the file systems of so many runs, and keep what came of it.

    Raises:
        RuntimeError: a run ended otherwise than well or by saying what is full, lost a checkpoint, or did not go on
            to the end of an undisturbed one.
    """
    log = faults.work / "undisturbed.log"
    with own_file_system(faults, LARGE_BYTES) as mount:
        (pid,) = faults.start(mount / "run", mount / "cache", log, more=MORE_WRITES)
        points = watch(pid, mount)
        (code,) = faults.finish([pid])
        if code:
            raise RuntimeError(f"the undisturbed run ended with {code}: {log.read_text()[-3000:]}")
        expected = contents(mount / "run", faults.steps)
    draw, left, after, at = random.Random(seed), [], Counter(), Counter()
    while sum(after.values()) < shrinks:
        left = left or draw.sample(points, len(points))  # each of them once, before any comes again
        # Short ones mostly: some writes follow each other within a millisecond.
        point, wait_s = left.pop(), MOST_WAIT_S * draw.random() ** 3
        try:
            place = run_on_shrinking_disk(faults, point, wait_s, expected)
        except RuntimeError as error:
            raise RuntimeError(f"of a disk that shrank {1000 * wait_s:.1f} ms after {point}: {error}") from error
        if place is None:
            continue  # what is there for less than a millisecond is not seen in every run
        after[re.sub(r"\d+", "N", point)] += 1
        at[place] += 1
        full = {name: count for name, count in at.most_common() if name != "finished"}
        found = {"asked": shrinks, "shrinks": sum(after.values()), "equal": sum(after.values())}
        found |= {"finished": at["finished"], "at": full, "after": dict(after.most_common())}
        results.keep({"fault": "a disk that shrinks", "processes": 1}, found)
        ended = place if place == "finished" else f"full at {place}"
        print(f"{sum(after.values())} shrinks, after {point}: {ended}, then equal", flush=True)


def write_points(mount: Path) -> list[str]:
    """Return what a run has written on a file system of its own, or has begun to, by names alike in every run."""
    names = [f"cache, entry {n}" for n, _ in enumerate((mount / "cache").rglob("*"), 1)]
    names += [f"logs, entry {n}" for n, _ in enumerate((mount / "run" / "logs").rglob("*"), 1)]
    with contextlib.suppress(FileNotFoundError):
        # Without the ends of temporary names.
        names += [re.sub(r"(?<=^\.export).*|[.-][0-9a-f]{32}$", "", name) for name in os.listdir(mount / "run")]
    return names


def watch(pid: int, mount: Path, until: str | None = None) -> list[str]:
    """Return the names of `write_points` in the order in which they appear, until a run ends, or one appears."""
    seen = {}
    while until not in seen and not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        seen |= dict.fromkeys(write_points(mount))
        time.sleep(0.001)
    return list(seen)


def run_on_shrinking_disk(faults: Faults, point: str, wait_s: float, expected: dict[str, bytes]) -> str | None:
    """Shrink a run's file system after one of its `write_points`, let it grow again, and resume the run.

    Returns:
        Which place was full; "finished" if the run ended well, None if it did before the disk could shrink.

    Raises:
        RuntimeError: it ended otherwise than by saying what is full, lost a checkpoint, or came to another end than
            is expected.
    """
    log, resumed_log = faults.work / "disk.log", faults.work / "resumed.log"
    for file in (log, resumed_log):
        file.unlink(missing_ok=True)
    with own_file_system(faults, LARGE_BYTES) as mount:
        run = (mount / "run", mount / "cache")
        (pid,) = faults.start(*run, log, more=MORE_WRITES)
        watch(pid, mount, until=point)
        time.sleep(wait_s)
        # It stands still meanwhile, so that what the disk holds now is what it holds when it has shrunk.
        faults.send(signal.SIGSTOP, [pid])
        if os.waitid(os.P_PID, pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT).si_code != os.CLD_STOPPED:
            (code,) = faults.finish([pid])
            if code:
                raise RuntimeError(f"the run ended with {code} before the disk shrank: {log.read_text()[-3000:]}")
            return None
        before, held = faults.newest_step(run[0]), os.statvfs(mount)
        resize(mount, max(1, held.f_blocks - held.f_bfree) * held.f_frsize)  # of size 0 it would have no limit
        faults.send(signal.SIGCONT, [pid])
        (code,) = faults.finish([pid])
        text = log.read_text(errors="replace")
        if "Traceback" in text:
            raise RuntimeError(f"the run ended with {code} and a traceback: {text[-3000:]}")
        place = "finished" if code == 0 else full_place(code, text, mount)
        if (after := faults.newest_step(run[0])) < before:
            raise RuntimeError(f"the run had checkpoint-{before}, and left {after or 'none'}: {text[-3000:]}")
        resize(mount, LARGE_BYTES)
        (code,) = faults.finish(faults.start(*run, resumed_log, more=MORE_WRITES))
        resumed = resumed_log.read_text(errors="replace")
        if code or "Traceback" in resumed:
            raise RuntimeError(f"the run went on after {text[-1500:]}\nand ended with {code}: {resumed[-3000:]}")
        if different := differences(expected, contents(run[0], faults.steps)):
            raise RuntimeError(
                f"{', '.join(different)} differ, of a run that went on after {text[-1500:]}\nby {resumed[-1500:]}"
            )
    return place


def resize(mount: Path, size_bytes: int) -> None:
    # Of what it holds now, the last page of each file can still be filled.
    subprocess.run(["mount", "-o", f"remount,size={size_bytes}", str(mount)], check=True)


def full_place(code: int, text: str, mount: Path) -> str:
    """Return which place a run names in its one error line, or its flags.

    Raises:
        RuntimeError: it does not, or it did not end by an error of the user.
    """
    errors = re.findall(r"error: .*", text)
    place = named_place(errors[0], mount) if errors else None
    if code != 2 or len(errors) != 1 or "No space left on device" not in errors[0]:
        raise RuntimeError(f"the run ended with {code}, and not by one error of a full disk: {text[-3000:]}")
    if place is None and PLACE_FLAGS in errors[0]:
        return "the flags"
    if place is None or "are free there" not in errors[0]:
        raise RuntimeError(f"the run did not say which place is full and what is free there: {text[-3000:]}")
    return place


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--kills", type=int, default=200, help="for each number of processes, at least [%(default)s]")
    add("--processes", type=int, nargs="+", choices=[1, 2], default=[1, 2], help="of a run [1 and 2]")
    add(
        "--gpu",
        action="store_true",
        help=f"the full size instead: 512 px, fp16, {' '.join(GPU_MODE)}, 240 steps, one process",
    )
    add("--base", type=Path, help="a base to use, such as train_step.py leaves in --work_dir [built]")
    add("--disk_sizes", type=int, default=40, help="file systems to fill; 0 for none [%(default)s]")
    add(
        "--shrinks",
        type=int,
        default=40,
        help="file systems that shrink under a run of one process; 0 for none [%(default)s]",
    )
    add("--seed", type=int, default=0, help="of the moments [%(default)s]")
    add("--out", type=Path, default=ROOT / "benchmarks" / "results" / "faults.json", help="added to [%(default)s]")
    add("--commit", help="of this project, where there is no git")
    args = parser.parse_args()
    if not args.gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)  # a process that has started threads cannot be forked
    script, results = load_script(), Results(args.out, args.commit, {})
    with tempfile.TemporaryDirectory() as work:
        # In a process of its own, which may start threads, and keeps no memory of the card.
        build = "import sys; from pathlib import Path; from rasengan import demo; work = Path(sys.argv[1]); "
        if args.base:
            (Path(work) / "base").symlink_to(args.base.resolve())
        elif args.gpu:
            build += "import full_size; full_size.build(work / 'base'); "
        else:
            build += "demo.build_tiny_sdxl(work / 'base'); "
        build += "demo.draw_picture_set(work / 'set')"
        command = [sys.executable, "-c", build, work]
        subprocess.run(command, check=True, capture_output=True, cwd=Path(__file__).parent)
        if args.gpu:
            with contextlib.closing(Faults(Path(work), script, 1, on_gpu=True)) as faults:
                kill_at_random(faults, args.kills, args.seed, results)
            return
        for processes in args.processes:
            faults = Faults(Path(work), script, processes)
            if args.kills:
                kill_at_random(faults, args.kills, args.seed, results)
            if args.disk_sizes and processes == 1:
                fill_the_disk(faults, args.disk_sizes, results)
            if args.shrinks and processes == 1:
                shrink_the_disk(faults, args.shrinks, args.seed, results)


if __name__ == "__main__":
    exit_cleanly(main)

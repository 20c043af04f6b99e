"""Feed broken files and command lines to everything that reads them: each is read, or refused by a UserError.

    make fuzz MINUTES=10

Half of the time hypothesis draws changes to valid files, and command lines; the other half atheris, where it is
installed, searches for bytes that reach new code. What fails is written to the folder fuzz-failures.
"""

import argparse
import itertools
import json
import logging
import mmap
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from peft import LoraConfig, inject_adapter_in_model


ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "benchmarks")]

from conftest import load_script  # noqa: E402
from measure import Results  # noqa: E402

from rasengan import (  # noqa: E402
    UserError,
    adapter_reader,
    adapter_writer,
    adapters,
    checkpoint,
    command_line,
    component_checks,
    components,
    demo,
    export,
    imaging,
    manifest,
    resuming,
    tensor_files,
)
from rasengan.sources import COMPONENTS  # noqa: E402


# --- what reads files: each takes bytes, and may raise a UserError alone ---


class Targets:
    """Valid files, and what reads each of them."""

    def __init__(self, work: Path):
        self.work, self.script = work, load_script("train_lora_sdxl")
        demo.build_tiny_sdxl(work / "base")
        demo.draw_picture_set(work / "set", count=4)
        model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        config = LoraConfig(r=2, lora_alpha=4, target_modules=["0"])
        inject_adapter_in_model(config, model)
        model.peft_config = {"default": config}
        adapter = export.live_adapter({"unet": model})
        adapter_writer.write_diffusers(work / "adapter", adapter)
        adapter_writer.write_peft_folders(work / "peft", adapter)
        adapter_writer.write_kohya(work / "kohya.safetensors", adapter)
        self.checkpoint = work / "run" / "checkpoint-2"
        shutil.copytree(work / "adapter", self.checkpoint)
        state = {"global_step": 2, "samples_seen": 4, "seed": 0, "rank": 2, "noise_offset": 0.0}
        (self.checkpoint / checkpoint.STATE_FILE).write_text(json.dumps(state))
        manifest.write_manifest(self.checkpoint)
        run = {"rank": 4, "validation_prompt": ["a", "b"], "center_crop": False, "learning_rate": 1e-4}
        (work / "run.yaml").write_text(yaml.safe_dump(run))

    def files(self) -> dict[str, tuple[Path, Callable[[], object]]]:
        """Return each file that is changed, and what reads it then."""
        work, base, saved = self.work, self.work / "base", self.checkpoint
        pictures = {path.name: path for path in sorted((work / "set").glob("*.*")) if path.suffix != ".jsonl"}
        folders = {name: base / name for name in COMPONENTS}
        return {
            "adapter": (
                work / "adapter" / adapters.DIFFUSERS_FILE,
                lambda: adapter_reader.read_adapter(work / "adapter", lora_alpha=None),
            ),
            "kohya's adapter": (
                work / "kohya.safetensors",
                lambda: adapter_reader.read_adapter(work / "kohya.safetensors"),
            ),
            "PEFT configuration": (
                work / "peft" / "adapter_config.json",
                lambda: adapter_reader.read_adapter(work / "peft"),
            ),
            "PEFT weights": (work / "peft" / adapters.PEFT_FILE, lambda: adapter_reader.read_adapter(work / "peft")),
            "pickled adapter": (
                work / "adapter.bin",
                lambda: adapter_reader.read_adapter(work / "adapter.bin", 4, allow_pickle=True),
            ),
            "manifest": (
                saved / manifest.MANIFEST_FILE,
                lambda: checkpoint.find_checkpoint(work / "run", "latest"),
            ),
            "trainer state": (
                saved / checkpoint.STATE_FILE,
                lambda: resuming.check_resumable(saved, {"rank": 2, "noise_offset": 0.0}),
            ),
            "configuration": (
                work / "run.yaml",
                lambda: self.script.parse_args(["--config", str(work / "run.yaml")]),
            ),
            "UNet's configuration": (
                base / "unet" / "config.json",
                lambda: component_checks.check_components(folders),
            ),
            "VAE's configuration": (base / "vae" / "config.json", lambda: component_checks.check_components(folders)),
            "scheduler's configuration": (
                base / "scheduler" / "scheduler_config.json",
                lambda: components.load("scheduler", base / "scheduler"),
            ),
        } | {
            f"picture {name}": (path, lambda path=path: self.look_at(path.read_bytes()))
            for name, path in pictures.items()
        }

    def look_at(self, content: bytes) -> None:
        """Inspect a picture as a run does: what Pillow raises must be told as the picture's error."""
        column = [{"bytes": content, "path": "picture"}]
        (picture,) = imaging.inspect_pictures(column, self.work / "memory")
        assert picture.error or (picture.height_px > 0 and picture.width_px > 0)

    def command_line(self, words: list[str]) -> None:
        """Read a command line."""
        self.script.parse_args(words)


def accepts(call: Callable[[], object]) -> None:
    """Call something that may refuse, but must not fail."""
    try:
        call()
    except (UserError, SystemExit):
        pass


def read_changed(file: Path, content: bytes, read: Callable[[], object]) -> None:
    """Read a file with other content."""
    before = file.read_bytes() if file.exists() else None
    try:
        file.write_bytes(content)
        accepts(read)
    finally:
        file.unlink() if before is None else file.write_bytes(before)


# --- engines ---


@st.composite
def changed(draw, content: bytes) -> bytes:
    """Draw a change to some bytes: cut, overwritten, repeated, or its numbers and words exchanged."""
    kind = draw(st.sampled_from(["cut", "overwrite", "insert", "swap", "anything"]))
    at = draw(st.integers(0, len(content)))
    if kind == "cut":
        return content[:at]
    if kind == "anything":
        return draw(st.binary(max_size=200))
    some = draw(st.binary(min_size=1, max_size=8))
    if kind == "overwrite":
        return content[:at] + some + content[at + len(some) :]
    if kind == "insert":
        return content[:at] + some * draw(st.integers(1, 50)) + content[at:]
    words = [b"null", b"[]", b"{}", b"-1", b"1e999", b"true", b'""', b"NaN", b"9" * 30]
    old = draw(st.sampled_from([b"1", b"2", b'"', b":", b"8", b"[", b"true"]))
    return content.replace(old, draw(st.sampled_from(words)), draw(st.integers(1, 3)))


def draw_with_hypothesis(targets: Targets, until_s: float, first_seed: int) -> int:
    """Try changes of every file, and command lines, until it is time; return how many."""
    seeds = itertools.count(first_seed)
    tried, files = 0, targets.files()
    torch.save({"unet.a.lora.down.weight": torch.zeros(2, 8)}, targets.work / "adapter.bin")
    flags = [action.option_strings[0] for action in targets.script.make_parser()._actions if action.option_strings]
    values = st.one_of(st.text(max_size=20), st.floats().map(str), st.integers().map(str), st.just("no"))
    lines = st.lists(st.one_of(st.sampled_from([f for f in flags if f not in {"-h", "--help"}]), values), max_size=8)
    options = settings(
        max_examples=50,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )

    def try_file(file: Path, read: Callable[[], object]) -> None:
        @seed(next(seeds))
        @options
        @given(changed(file.read_bytes()))
        def attempt(content):
            read_changed(file, content, read)

        attempt()

    def try_lines() -> None:
        @seed(next(seeds))
        @options
        @given(lines)
        def attempt(words):
            if "--config" not in {word.partition("=")[0] for word in words}:
                accepts(lambda: targets.command_line(words))

        attempt()

    while time.monotonic() < until_s:
        for file, read in files.values():
            try_file(file, read)
            try_lines()
            tried += 2 * options.max_examples
            if time.monotonic() > until_s:
                break
    return tried


def search_with_atheris(targets: Targets, until_s: float, first_seed: int, tried: mmap.mmap) -> None:
    """Search for bytes that reach new code in what reads headers and configurations; ends the process.

    How many inputs were tried is written to a memory that outlives it.
    """
    import atheris

    for module in (adapter_reader, tensor_files, checkpoint, resuming, components, command_line):
        for name, function in vars(module).copy().items():
            if callable(function) and getattr(function, "__module__", "") == module.__name__:
                if not isinstance(function, type):
                    setattr(module, name, atheris.instrument_func(function))
    files = [entry for name, entry in targets.files().items() if not name.startswith("picture")]

    numbers = itertools.count(1)

    def one(content: bytes) -> None:
        tried[:] = next(numbers).to_bytes(8, "little")
        if content:
            file, read = files[content[0] % len(files)]
            read_changed(file, content[1:], read)

    corpus = targets.work / "corpus"
    corpus.mkdir()
    for number, (file, _) in enumerate(files):
        if file.exists():
            (corpus / str(number)).write_bytes(bytes([number]) + file.read_bytes())
    failures = ROOT / "fuzz-failures"
    failures.mkdir(exist_ok=True)
    seconds = max(1, int(until_s - time.monotonic()))
    options = [
        f"-max_total_time={seconds}",
        f"-seed={first_seed + 1}",
        f"-artifact_prefix={failures}/",
        "-max_len=8192",
    ]
    atheris.Setup([sys.argv[0], str(corpus), *options, "-print_final_stats=1"], one)
    atheris.Fuzz()


def keep(engine: str, tried: int, out: Path | None) -> None:
    """Print how many inputs were tried, none of which failed, and add it to the results, if asked for."""
    print(f"{tried} inputs, each read or refused", flush=True)
    if out:
        Results(out, None, {}).keep({"engine": engine}, {"inputs": tried})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, help="[%(default)s]")
    parser.add_argument("--engine", choices=["hypothesis", "atheris"], required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a JSON file to add the number of inputs to")
    args = parser.parse_args()
    logging.disable()  # what is told of each input
    with tempfile.TemporaryDirectory() as work:
        targets = Targets(Path(work))
        until_s = time.monotonic() + 60 * args.minutes
        if args.engine == "atheris":
            tried, child = mmap.mmap(-1, 8), os.fork()
            if not child:
                search_with_atheris(targets, until_s, args.seed, tried)
            if code := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
                sys.exit(code)
            keep("atheris", int.from_bytes(tried[:], "little"), args.out)
            return
        try:
            keep("hypothesis", draw_with_hypothesis(targets, until_s, args.seed), args.out)
        except BaseException:
            failures = ROOT / "fuzz-failures"
            failures.mkdir(exist_ok=True)
            (failures / "hypothesis.txt").write_text(traceback.format_exc())
            raise


if __name__ == "__main__":
    main()

"""The training programs that are compared, each with the same weights, pictures and settings.

    ours         scripts/train_lora_sdxl.py
    diffusers    examples/text_to_image/train_text_to_image_lora_sdxl.py of a diffusers checkout
    sd-scripts   sdxl_train_network.py of a kohya-ss/sd-scripts checkout, conditioning cached as here

fp16, LoRA of rank 16 on the UNet's 560 query, key, value and output projections, 8-bit AdamW, a constant rate,
TensorBoard and the progress bar on, no pictures drawn, no checkpoints.
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

import full_size
import single_file
import torch
from measure import ROOT, Results, run_instrumented
from transformers import CLIPTokenizer

from rasengan import UserError, demo


RANK, ALPHA = 16, 32
PIPELINE = {
    "_class_name": "StableDiffusionXLPipeline",
    "force_zeros_for_empty_prompt": True,
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
# The folders that sd-scripts looks for in its --tokenizer_cache_dir.
SD_TOKENIZERS = {
    "tokenizer": "openai_clip-vit-large-patch14",
    "tokenizer_2": "laion_CLIP-ViT-bigG-14-laion2B-39B-b160k",
}
# A package of 50 MB that sd-scripts imports, and what it calls of it here; written where it is missing.
CV2_STAND_IN = '''"""A stand-in: of OpenCV, this run of sd-scripts only turns RGB into BGR and back."""

COLOR_RGB2BGR = COLOR_BGR2RGB = "swap"


def cvtColor(image, how):
    assert how == "swap"
    return image[..., ::-1].copy()
'''


@dataclass(frozen=True)
class Case:
    """What is trained."""

    resolution_px: int
    batch_size: int


@dataclass
class Bench:
    """The inputs of all programs, in one work folder, and where the peers are."""

    work: Path
    logs: Path
    results: Results
    tiny: bool = False
    diffusers_examples: Path | None = None
    sd_scripts: Path | None = None
    sd_scripts_packages: Path | None = None
    output_count: int = field(default=0, init=False)
    failed: list[str] = field(default_factory=list, init=False)  # the logs of runs that did not end well

    # --- inputs ---

    def prepare(self) -> None:
        """Build what is not in the work folder yet: weights, pictures, and both in the peers' layouts."""
        build = demo.build_tiny_sdxl if self.tiny else full_size.build
        size_px = 64 if self.tiny else 640
        self.once("base", build)
        self.once("pictures", lambda folder: full_size.draw_jpegs(folder, 96, size_px))
        if self.diffusers_examples:
            self.once("pipeline", self.write_pipeline)
        if self.sd_scripts:
            self.once("sd-scripts", self.write_sd_scripts_inputs)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def once(self, name: str, build) -> None:
        """Build a folder, which gets its name only when it is whole."""
        folder, unfinished = self.work / name, self.work / f"{name}.unfinished"
        if not folder.exists():
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            build(unfinished)
            unfinished.rename(folder)

    def write_pipeline(self, folder: Path) -> None:
        """Write the base as a pipeline, which diffusers' example asks for."""
        for name in PIPELINE:
            if not name.startswith(("_", "force")):
                (folder / name).symlink_to(self.work / "base" / name)
        (folder / "model_index.json").write_text(json.dumps(PIPELINE, indent=2))

    def write_sd_scripts_inputs(self, folder: Path) -> None:
        """Write the base as one file, and the first LoRA, tokenizers and captions as sd-scripts reads them."""
        base, pictures = self.work / "base", self.work / "pictures"
        single_file.write_single_file(base, folder / "base.safetensors")
        single_file.write_first_lora(base, folder / "first_lora.safetensors", RANK, ALPHA)
        for name, place in SD_TOKENIZERS.items():
            write_plain_tokenizer(base / name, folder / "tokenizers" / place)
        # The number of repeats, so that no epoch ends within a run: its loader would start anew.
        subset = folder / "pictures" / "1000_pictures"
        subset.mkdir(parents=True)
        for line in map(json.loads, (pictures / "metadata.jsonl").read_text().splitlines()):
            (subset / line["file_name"]).symlink_to(pictures / line["file_name"])
            (subset / line["file_name"]).with_suffix(".txt").write_text(line["text"])
        (folder / "stand-ins").mkdir()
        if importlib.util.find_spec("cv2") is None:
            (folder / "stand-ins" / "cv2.py").write_text(CV2_STAND_IN)

    # --- runs ---

    def run(
        self,
        program: str,
        case: Case,
        steps: int,
        arguments: list[str],
        options: list[str] = (),
        fresh: bool = False,
    ) -> dict:
        """Train for so many steps under instrument.py, and return what was found.

        Args:
            program: its name in this module's head.
            case: what to train.
            steps: optimizer steps.
            arguments: more of the program's flags.
            options: of instrument.py.
            fresh: forget what an earlier run cached.
        """
        self.output_count += 1
        output = self.work / "runs" / f"{self.output_count:03d}"
        shutil.rmtree(output, ignore_errors=True)
        if fresh:
            shutil.rmtree(self.work / "cache", ignore_errors=True)
            for cached in (self.work / "sd-scripts" / "pictures").glob("*/*.npz"):
                cached.unlink()
        if self.tiny:
            case = Case(64, min(case.batch_size, 2))
        make = {"ours": self.ours, "diffusers": self.diffusers, "sd-scripts": self.sd_scripts_network}[program]
        command, how = make(case, steps, output)
        slug = f"{self.output_count:03d}-{program}-{case.resolution_px}px-b{case.batch_size}-{steps}-steps"
        log = self.logs / f"{slug}.log"
        found = run_instrumented([*command, *arguments], log, [*options], **how)
        # What our memory plan said, for the figures beside what was measured.
        text = log.read_text(errors="replace")
        plans = re.findall(r"Memory plan: (.*)", text), re.findall(r"predicted peak +([\d.]+) GiB", text)
        if all(plans):
            found |= {"plan": plans[0][-1], "predicted_gib": float(plans[1][-1])}
        shutil.rmtree(output, ignore_errors=True)
        print(slug, json.dumps(found), flush=True)
        if found["exit_code"]:
            self.failed.append(log.name)
        return found

    def end(self) -> None:
        """Say what went wrong.

        Raises:
            UserError: a run failed, or there was none.
        """
        if self.failed:
            logs = f"{', '.join(self.failed)} in {self.logs}"
            raise UserError(f"{len(self.failed)} of {self.output_count} runs failed. See {logs}.")
        if not self.output_count:
            raise UserError("There was nothing to run: what was picked does not go together, or --out has it already.")

    def ours(self, case: Case, steps: int, output: Path) -> tuple[list[str], dict]:
        """Return the command, and how to run it."""
        command = [str(ROOT / "scripts" / "train_lora_sdxl.py"), *self.diffusers_words(case, steps, output)]
        command += ["--pretrained_model_name_or_path", str(self.work / "base")]
        command += ["--lora_alpha", str(ALPHA), "--conditioning_cache_dir", str(self.work / "cache")]
        return command, {"environment": {"PYTHONPATH": joined_path(ROOT)}}

    def diffusers(self, case: Case, steps: int, output: Path) -> tuple[list[str], dict]:
        """Return the command, and how to run it."""
        script = "text_to_image/train_text_to_image_lora_sdxl.py"
        places = [self.diffusers_examples / script, self.diffusers_examples / "examples" / script]
        found = [place for place in places if place.exists()]
        if not found:
            raise UserError(f"--diffusers_examples {self.diffusers_examples} has no {script}.")
        command = [str(found[0]), *self.diffusers_words(case, steps, output)]
        command += ["--pretrained_model_name_or_path", str(self.work / "pipeline")]
        return [*command, "--use_8bit_adam", "--center_crop"], {}

    def diffusers_words(self, case: Case, steps: int, output: Path) -> list[str]:
        """Return the arguments that this project shares with diffusers' example."""
        words = ["--train_data_dir", str(self.work / "pictures"), "--resolution", str(case.resolution_px)]
        words += ["--train_batch_size", str(case.batch_size), "--max_train_steps", str(steps), "--seed", "0"]
        words += ["--rank", str(RANK), "--mixed_precision", "no" if self.tiny else "fp16"]
        return [*words, "--checkpointing_steps", "1000000", "--output_dir", str(output)]

    def sd_scripts_network(self, case: Case, steps: int, output: Path) -> tuple[list[str], dict]:
        """Return the command, and how to run it."""
        inputs = self.work / "sd-scripts"
        script = self.sd_scripts / "sdxl_train_network.py"
        if not script.exists():
            raise UserError(f"--sd_scripts {self.sd_scripts} has no {script.name}.")
        command = [str(script), "--pretrained_model_name_or_path", str(inputs / "base.safetensors")]
        command += ["--tokenizer_cache_dir", str(inputs / "tokenizers"), "--train_data_dir", str(inputs / "pictures")]
        command += ["--caption_extension", ".txt", "--resolution", f"{case.resolution_px},{case.resolution_px}"]
        command += ["--resize_interpolation", "lanczos", "--train_batch_size", str(case.batch_size)]
        command += ["--network_module", "networks.lora", "--network_train_unet_only", "--dim_from_weights"]
        command += ["--network_weights", str(inputs / "first_lora.safetensors")]
        command += ["--cache_latents", "--cache_latents_to_disk", "--vae_batch_size", "8", "--no_half_vae"]
        command += ["--cache_text_encoder_outputs", "--cache_text_encoder_outputs_to_disk"]
        command += ["--optimizer_type", "AdamW8bit", "--learning_rate", "1e-4", "--sdpa", "--mixed_precision", "fp16"]
        command += ["--max_data_loader_n_workers", "2", "--persistent_data_loader_workers", "--seed", "0"]
        command += ["--max_train_steps", str(steps), "--output_dir", str(output), "--output_name", "lora"]
        command += ["--logging_dir", str(output / "logs"), "--log_with", "tensorboard"]
        first = [inputs / "stand-ins"] + ([self.sd_scripts_packages] if self.sd_scripts_packages else [])
        return command, {"cwd": self.sd_scripts, "environment": {"PYTHONPATH": joined_path(*first)}}


def write_plain_tokenizer(source: Path, folder: Path) -> None:
    """Write a tokenizer as `vocab.json` and `merges.txt`, which every version of transformers reads."""
    tokenizer = CLIPTokenizer.from_pretrained(source)
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    special = {f"{kind}_token": getattr(tokenizer, f"{kind}_token") for kind in ("bos", "eos", "unk", "pad")}
    config = special | {"tokenizer_class": "CLIPTokenizer", "model_max_length": tokenizer.model_max_length}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def joined_path(*first: Path) -> str:
    """Return a PYTHONPATH that begins with these folders."""
    return os.pathsep.join([*map(str, first), *filter(None, [os.environ.get("PYTHONPATH")])])


# --- the command line that the benchmarks share ---


def make_parser(description: str, out: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    results = ROOT / "benchmarks" / "results" / out
    parser.set_defaults(results=results)
    add("--out", type=Path, help=f"added to, run by run [{results}; with --tiny, {out} in --work_dir]")
    add("--logs", type=Path, help="where the runs' output goes [in --work_dir]")
    add("--work_dir", type=Path, default=ROOT / ".benchmarks", help="weights, pictures, caches; kept [%(default)s]")
    add("--commit", help="of this project, where there is no git")
    add("--diffusers_examples", type=Path, help="a diffusers checkout, or its examples folder")
    add("--sd_scripts", type=Path, help="a kohya-ss/sd-scripts checkout")
    add("--sd_scripts_packages", type=Path, help="a folder of packages for sd-scripts alone, of the versions it needs")
    add("--tiny", action="store_true", help="the embedded tiny SDXL and few steps, to try this without a GPU")
    return parser


def open_bench(args: argparse.Namespace) -> Bench:
    """Return the bench of a command line, its inputs built.

    Raises:
        UserError: a folder is missing, or there is no GPU for the full size.
    """
    if not args.tiny and not torch.cuda.is_available():
        raise UserError("There is no GPU here, and the full size needs one: give --tiny to try the benchmark.")
    if args.sd_scripts and args.tiny:
        raise UserError("--sd_scripts goes without --tiny: its architecture is the full size's.")
    folders = {"diffusers_examples": None, "sd_scripts": None, "sd_scripts_packages": None}
    for name in folders:
        if getattr(args, name):
            folders[name] = getattr(args, name).resolve()
            if not folders[name].is_dir():
                raise UserError(f"--{name} {getattr(args, name)} is not a folder.")
    if (args.diffusers_examples or args.sd_scripts) and importlib.util.find_spec("torchvision") is None:
        raise UserError("The peers need torchvision, which is not installed: `pip install torchvision`.")
    args.out = args.out or (args.work_dir / args.results.name if args.tiny else args.results)
    names = {"diffusers": folders["diffusers_examples"], "sd-scripts": folders["sd_scripts"]}
    results = Results(args.out, args.commit, {name: folder for name, folder in names.items() if folder})
    if folders["sd_scripts_packages"]:
        found = folders["sd_scripts_packages"].glob("*.dist-info")
        results.data["peers"]["sd-scripts packages"] = sorted(folder.stem for folder in found)
    work = args.work_dir.resolve() / ("tiny" if args.tiny else "full-size")
    bench = Bench(work, (args.logs or work / "logs").resolve(), results, args.tiny, **folders)
    bench.prepare()
    return bench


def exit_cleanly(main) -> None:
    """Run a benchmark; a mistake of the user is one line and exit code 2."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)

"""How long does a training step take, here and in the peers, and how long until the first one?

    python benchmarks/train_step.py [--diffusers_examples PATH] [--sd_scripts PATH]

Full-size SDXL with random weights, 96 JPEG files. Each variant trains three times: `profile` builds the caches anew
and profiles three steps (what keeps the GPU busy); `short` and `long` are whole runs whose caches are warm, and the
wall time of a step is what the longer took more after its first step, by the steps that it did more. A ratio compares
runs of one command.
--cases, --programs, --variants and --runs keep a command short; what several find adds up in --out.
"""

import math
import sys

from measure import outside_ms, run
from programs import Bench, Case, exit_cleanly, make_parser, open_bench

from rasengan import UserError
from rasengan.command_line import number_type


SHORT_STEPS = 12
MORE_STEPS = 20, 1000  # of a long run, at least and at most
CASES = {
    "512px b1": Case(512, 1),
    "512px b8": Case(512, 8),
    "1024px b4": Case(1024, 4),
}
# case -> program -> variant -> arguments; ours without any is what the memory plan picks
VARIANTS = {
    "512px b1": {
        "ours": {
            "default": [],
            "a checkpoint every 100 steps": ["--checkpointing_steps", "100"],
            "deterministic": ["--deterministic"],
            "fp32 AdamW": ["--no-use_8bit_adam"],
        },
        "diffusers": {"the report's recipe": ["--gradient_checkpointing"]},
        "sd-scripts": {
            "checkpointing": ["--gradient_checkpointing"],
            "no checkpointing": [],
            "no checkpointing, full fp16": ["--full_fp16"],
        },
    },
    "512px b8": {
        "ours": {"default": []},
        "diffusers": {"the report's recipe": ["--gradient_checkpointing"]},
        "sd-scripts": {"no checkpointing": [], "no checkpointing, full fp16": ["--full_fp16"]},
    },
    "1024px b4": {"ours": {"default": []}},
}
RUNS = ("profile", "short", "long")
# What any program of these libraries does before its first step: import them, and bring the UNet to the card.
LIBRARIES_ALONE = """
import sys
import accelerate, bitsandbytes, datasets, diffusers, peft, torch, transformers
from peft import LoraConfig
from torch.utils.tensorboard import SummaryWriter
device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
unet = diffusers.UNet2DConditionModel.from_pretrained(sys.argv[1], torch_dtype=dtype).to(device)
if device == "cuda":
    torch.cuda.synchronize()
"""


def measure_steps(bench: Bench, case: str, program: str, variant: str, runs: list[str], seconds: float) -> None:
    """Run what is asked of one variant, and keep what is found after each run."""
    arguments = VARIANTS[case][program][variant]
    names = {"case": case, "program": program, "variant": variant}
    earlier = [bench.results.latest(names).get(name, {}) for name in RUNS]
    found = {"arguments": " ".join(arguments)}
    if "profile" not in runs and "short" in runs:
        bench.run(program, CASES[case], 2, arguments)  # fills the caches
    for name in runs:
        # A tiny run only shows that all of this works, and should be over soon.
        steps, options = (4, ["--warm_up_steps", "1"]) if bench.tiny else (SHORT_STEPS, [])
        if name == "profile":
            options = [*options, "--profile_steps", "3"]
            steps += 8
        elif name == "long" and bench.tiny:
            steps += 4
        elif name == "long":
            known = [run["step_ms_median"] for run in (*earlier, *found.values()) if "step_ms_median" in run]
            more = math.ceil(1e3 * seconds / min(known)) if known else MORE_STEPS[0]
            steps += min(max(more, MORE_STEPS[0]), MORE_STEPS[1])
        result = bench.run(program, CASES[case], steps, arguments, options, fresh=name == "profile")
        found[name] = {"steps": steps} | result
        if name == "long" and result["exit_code"] == 0 and "short" in found:
            wall_ms = outside_ms(found["short"], found["long"])
            if wall_ms is None:
                print(f"{name}: the runs' ends differed by more than the steps; give more --seconds", flush=True)
            else:
                found["wall_ms_per_step"] = round(wall_ms, 2)
                found["wall_ms_per_image"] = round(wall_ms / CASES[case].batch_size, 2)
        bench.results.keep(names, found)
        if result["exit_code"]:
            break


def measure_start(bench: Bench) -> None:
    """Measure a second start, its cache warm, until the first step, and the libraries' own share of it."""
    case = CASES["512px b1"]
    bench.run("ours", case, 2, [], fresh=True)
    for name in ("second start", "third start"):
        names = {"case": "start", "program": "ours", "variant": name}
        bench.results.keep(names, bench.run("ours", case, 4, [], ["--warm_up_steps", "1"]))
    command = [sys.executable, "-c", LIBRARIES_ALONE, str(bench.work / "base" / "unet")]
    for name in ("libraries and UNet alone", "libraries and UNet alone, again"):
        names = {"case": "start", "program": "libraries", "variant": name}
        bench.results.keep(names, run(command, bench.logs / "libraries.log"))


def chosen(flag: str, given: str | None, known: list[str]) -> list[str]:
    """Return what a list separated by commas picks.

    Raises:
        UserError: it names something else.
    """
    # A variant's name may hold a comma: then it is separated by semicolons.
    picked = [part.strip() for part in given.split(";" if ";" in given else ",")] if given else known
    if given in known:
        picked = [given]
    for name in picked:
        if name not in known:
            raise UserError(f"{flag} names {name!r}, which is not one of: {'; '.join(known)}.")
    return picked


def main() -> None:
    parser = make_parser(__doc__, "train_step.json")
    add = parser.add_argument
    cases, variants = [*CASES, "start"], {v: 0 for c in VARIANTS.values() for p in c.values() for v in p}
    add("--cases", help=f"of {'; '.join(cases)}, separated by commas [all]")
    add("--programs", help="of ours, diffusers, sd-scripts [those that have a path]")
    add("--variants", help=f"of {'; '.join(variants)}, separated by semicolons [all]")
    add("--runs", help=f"of {', '.join(RUNS)} [all]")
    add(
        "--seconds",
        type=number_type(0, float),
        default=20,
        help="how much longer the long run is than the short [%(default)s]",
    )
    args = parser.parse_args()
    have = ["ours"] + ["diffusers"] * bool(args.diffusers_examples) + ["sd-scripts"] * bool(args.sd_scripts)
    cases, programs = chosen("--cases", args.cases, cases), chosen("--programs", args.programs, have)
    variants, runs = chosen("--variants", args.variants, [*variants]), chosen("--runs", args.runs, list(RUNS))
    bench = open_bench(args)
    for case in cases:
        if case == "start":
            measure_start(bench)
        for program in programs:
            for variant in VARIANTS.get(case, {}).get(program, {}):
                if variant in variants:
                    measure_steps(bench, case, program, variant, runs, args.seconds)
    bench.end()


if __name__ == "__main__":
    exit_cleanly(main)

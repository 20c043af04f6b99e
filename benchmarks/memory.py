"""How much memory does training take, on the card and on the host, here and in the peers?

    python benchmarks/memory.py [--diffusers_examples PATH] [--sd_scripts PATH]

Full-size SDXL with random weights, 96 JPEG files. Peaks of the whole run (`peak_*`) and from the first step on
(`loop_peak_*`), in GiB; the host's is read from outside. "T4" settings run under a 14.3 GiB cap that fails like a
smaller card, with flash attention off, 20 steps each.
"""

from instrument import T4_BUDGET_GIB
from programs import Case, exit_cleanly, make_parser, open_bench
from train_step import chosen


NONE, FULL = ["--no-gradient_checkpointing"], ["--gradient_checkpointing"]
STEPS, TINY_STEPS = 20, 4
# setting -> case, our arguments, options of instrument.py
SETTINGS = {
    "512px b1, no checkpointing": (Case(512, 1), NONE, []),
    "512px b1, full checkpointing": (Case(512, 1), FULL, []),
    "512px b8, no checkpointing": (Case(512, 8), NONE, []),
    "1024px b1, no checkpointing, no flash attention": (Case(1024, 1), NONE, ["--no_flash_attention"]),
    "512px b1, nf4, full checkpointing": (Case(512, 1), [*FULL, "--base_quantization", "nf4"], []),
} | {
    f"T4: {resolution_px}px b{batch_size}": (
        Case(resolution_px, batch_size),
        ["--vram_budget_gib", str(T4_BUDGET_GIB)],
        ["--as_t4"],
    )
    for resolution_px, batch_size in ((512, 1), (512, 2), (512, 4), (512, 8), (768, 2), (1024, 1), (1024, 2))
}
# program -> setting -> case, arguments
PEERS = {
    "diffusers": {
        "512px b1, no checkpointing": (Case(512, 1), []),
        "512px b1, full checkpointing": (Case(512, 1), FULL),
        "512px b8, full checkpointing": (Case(512, 8), FULL),
    },
    "sd-scripts": {
        "512px b1, no checkpointing": (Case(512, 1), []),
        "512px b1, full checkpointing": (Case(512, 1), FULL),
        "512px b8, no checkpointing": (Case(512, 8), []),
    },
}


def main() -> None:
    parser = make_parser(__doc__, "memory.json")
    add = parser.add_argument
    settings = [*SETTINGS, *(name for peer in PEERS.values() for name in peer if name not in SETTINGS)]
    add("--settings", help=f"separated by semicolons, of: {'; '.join(settings)} [all]")
    add("--programs", help="of ours, diffusers, sd-scripts [those that have a path]")
    add("--again", action="store_true", help="run what --out already has, too")
    args = parser.parse_args()
    have = ["ours"] + ["diffusers"] * bool(args.diffusers_examples) + ["sd-scripts"] * bool(args.sd_scripts)
    programs = chosen("--programs", args.programs, have)
    settings = chosen("--settings", args.settings, settings)
    bench, built = open_bench(args), set()
    for program in programs:
        for name in settings:
            known = SETTINGS if program == "ours" else PEERS[program]
            names = {"setting": name, "program": program}
            done = bench.results.latest(names)
            if name not in known or (done.get("exit_code") == 0 and not args.again):
                continue
            case, arguments, *options = known[name]
            steps = TINY_STEPS if bench.tiny else STEPS
            # Building the cache is part of a whole run: the first of a program at a resolution does it.
            fresh = (program, case.resolution_px) not in built
            built.add((program, case.resolution_px))
            found = bench.run(program, case, steps, arguments, *options, fresh=fresh)
            bench.results.keep(names, {"arguments": " ".join(arguments), "steps": steps} | found)
    bench.end()


if __name__ == "__main__":
    exit_cleanly(main)

import ast
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
# The floor each module stands on; it may import only from floors below its own.
FLOORS = [
    {"__init__", "files", "loss_chart", "naming", "painting", "safetensors_header"},
    {
        "adamw_8bit",
        "adapters",
        "command_line",
        "data_scope",
        "downloads",
        "families",
        "labels",
        "manifest",
        "metadata",
        "near_duplicates",
        "nvrtc",
        "objective",
        "row_file",
        "side_stream",
        "stopping",
    }
    | {"tensor_files", "world"},
    {"adapter_settings", "sources"},
    {"adapter_file"},
    {"adapter_reader", "adapter_writer", "components", "endings", "graphs", "imaging"}
    | {"kernels", "locks", "logs", "memory", "miniature", "norms", "optim", "pages", "picture_files", "sdxl"}
    | {"text_attention"}
    | {"single_file"},
    {"adapter_places", "captions", "component_checks", "diagnosis", "fitting", "loader", "memory_plan", "quantization"}
    | {"sheets"},
    {
        "conversion",
        "data",
        "decoding",
        "demo",
        "export",
        "lora",
        "low_rank",
        "nodes",
        "processes",
        "run_folders",
    }
    | {"scores"},
    {"sharded_cache"},
    {"cache", "checkpoint", "data_survey", "drawing", "hub", "merging", "progress", "projections", "samples"},
    {"compared_models", "data_statistics", "fused"},
    {
        "checkpoint_writer",
        "conditioning",
        "data_report",
        "held_out",
        "pipeline",
        "prompts",
        "resuming",
        "step",
        "whole_model",
    }
    | {"validation_loss", "validation_pictures"},
    {"data_page", "evaluated_run", "evaluation", "loss_comparison", "pairs", "rescue", "sweep", "training_settings"},
    {"evaluation_page"},
]
FLOOR_OF = {name: number for number, names in enumerate(FLOORS) for name in names}
MODULES = sorted((ROOT / "rasengan").glob("*.py"))


def parse(path):
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def imported_names(nodes):
    """Absolute dotted names, `from a import b` giving both a and a.b."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_module_has_a_floor():
    assert {path.stem for path in MODULES} == set(FLOOR_OF)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_imports_only_go_down(path):
    names = [name.split(".") for name in imported_names(parse(path))]
    imported = {parts[1] for parts in names if parts[0] == "rasengan" and len(parts) > 1} & set(FLOOR_OF)
    upward = {name for name in imported if FLOOR_OF[name] >= FLOOR_OF[path.stem]}
    assert not upward
    assert "scripts" not in {parts[0] for parts in names}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_a_module_reads_no_environment_prints_nothing_and_takes_no_args(path):
    for node in parse(path):
        if isinstance(node, ast.Attribute):
            assert node.attr not in {"environ", "environb", "getenv", "putenv"}, node.lineno
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print", node.lineno
        elif isinstance(node, ast.arg):
            assert node.arg != "args", node.lineno
    forbidden = {"argparse", "os.environ", "os.getenv", "sys.argv"} - (
        {"argparse"} if path.stem == "command_line" else set()
    )
    assert not forbidden & set(imported_names(parse(path)))

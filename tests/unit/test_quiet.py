import logging
import subprocess
import sys
from pathlib import Path

import pytest

import rasengan  # noqa: F401, whose import sets the filters


ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward from kernels-community: %s. Please"),
        ("transformers.utils.import_utils", "CLIPImageProcessor requires torchvision, not installed: %s"),
    ],
)
def test_what_a_library_says_at_import_of_packages_that_nothing_needs_is_not_shown(name, message, caplog):
    logger = logging.getLogger(name)
    logger.warning(message, "No module named 'kernels'")
    assert [record for record in caplog.records if record.name == name] == []
    assert len(logger.filters) == 1
    logger.warning("another thing")
    assert logger.filter(logger.makeRecord(name, logging.WARNING, "", 0, "another thing", (), None))


def test_the_libraries_write_nothing_to_stderr_at_import():
    code = "import rasengan, bitsandbytes, diffusers, peft, transformers"
    finished = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (finished.returncode, finished.stderr) == (0, "")


def test_drawing_imports_no_library_that_only_training_needs():
    code = "import sys, infer; sys.exit(str({'datasets', 'pandas', 'pyarrow', 'tensorboard'} & set(sys.modules)))"
    finished = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "scripts", capture_output=True, text=True, timeout=120
    )
    assert finished.stderr.strip() == "set()"

"""Two machines with a disk of their own each: here two processes, started as a launcher on each would."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from rasengan import demo


SCRIPT = Path(__file__).parents[2] / "scripts" / "train_lora_sdxl.py"


@pytest.fixture
def refused_on_both(train_arguments):
    """Function that trains on two machines with flags of their own, and returns the line that each ends with."""

    def run(*flags_of_each) -> list[str]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
        here = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        words = [sys.executable, SCRIPT, *train_arguments, "--train_batch_size", 1, "--report_to", "none"]
        machines = [
            subprocess.Popen(
                [*map(str, words), *map(str, flags)],
                env=os.environ | address | here | {"RANK": str(rank)},
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank, flags in enumerate(flags_of_each)
        ]
        try:
            errors = [machine.communicate(timeout=120)[1] for machine in machines]
        finally:
            for machine in machines:
                machine.kill()
        assert [machine.returncode for machine in machines] == [2, 2], errors
        return [error.splitlines()[-1] for error in errors]

    return run


def test_a_checkpoint_that_one_machine_alone_has_is_not_gone_on_with(refused_on_both, trained, tmp_path):
    shutil.copytree(trained / "checkpoint-2", tmp_path / "first" / "checkpoint-2")
    resume = ["--resume_from_checkpoint", "latest", "--output_dir"]
    first, second = refused_on_both([*resume, tmp_path / "first"], [*resume, tmp_path / "second"])
    assert "the same checkpoint in --output_dir, but checkpoint-2, none. Give every machine a copy" in first
    assert second == first.replace("error:", "error (process 1):")
    assert [path.name for path in (tmp_path / "first").iterdir()] == ["checkpoint-2"]


def test_machines_with_other_pictures_do_not_train_together(refused_on_both, tmp_path):
    for seed, name in enumerate(("one", "another")):
        demo.draw_picture_set(tmp_path / name, count=4, seed=seed)
    flags = [["--train_data_dir", tmp_path / name, "--output_dir", tmp_path / "run"] for name in ("one", "another")]
    lines = refused_on_both(*flags)
    assert all("the same pictures and captions, but those of digest " in line for line in lines)


def test_machines_with_other_settings_do_not_train_together(refused_on_both, tmp_path):
    flags = [["--output_dir", tmp_path / "run", "--learning_rate", rate] for rate in (1e-4, 1e-2)]
    flags[1] += ["--use_ema", "--dataloader_num_workers", 1]  # the latter may differ
    lines = refused_on_both(*flags)
    differing = "the same settings: --learning_rate is 0.0001, 0.01; --use_ema is False, True. Start every machine"
    assert all(differing in line for line in lines)
    assert not list((tmp_path / "run").glob("*.safetensors"))

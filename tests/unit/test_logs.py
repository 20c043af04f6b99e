import subprocess
import sys

import torch

from rasengan import logs


BESIDE_A_BAR = """
import logging, sys
from tqdm.auto import tqdm
from rasengan import logs
from rasengan.processes import SteadyStream

logs.begin(["rasengan"], speaks=True)
with tqdm(total=3, desc="Steps", file=SteadyStream(sys.stderr), mininterval=0) as bar:
    bar.update()
    logging.getLogger("rasengan").info("Saving a checkpoint")
    bar.update()
"""


def test_what_is_said_beside_a_progress_bar_has_a_line_of_its_own():
    finished = subprocess.run([sys.executable, "-c", BESIDE_A_BAR], capture_output=True, text=True, check=True)
    lines = [line for line in finished.stderr.replace("\r", "\n").splitlines() if "Saving" in line]
    assert len(lines) == 1
    assert lines[0].endswith(" Saving a checkpoint")
    assert "Steps" not in lines[0]


def test_the_loss_of_each_sample_is_logged_by_its_name_beside_a_folder(accelerator, notes, tmp_path, monkeypatch):
    names = [str(tmp_path / "set" / name) for name in ("a.png", "sub/b.png")]
    losses = torch.tensor([0.5, 0.25])
    logs.log_each_loss(accelerator, names, losses, str(tmp_path / "set"), 3)
    monkeypatch.chdir(tmp_path)
    logs.log_each_loss(accelerator, names, losses, None, 4)
    assert notes.kept == [
        (3, {"loss_for_a.png": 0.5, "loss_for_sub/b.png": 0.25}),
        (4, {"loss_for_set/a.png": 0.5, "loss_for_set/sub/b.png": 0.25}),
    ]

import os
import signal
import socket
import subprocess
import sys

import pytest


SURVIVE = """
import os, signal, sys, time
from rasengan import processes, sharded_cache

rank, killed, calls = os.environ["RANK"], sys.argv[1], sys.argv[2:]
processes.make_accelerator(os.environ, "no")
processes.wait_for_everyone()
if rank == killed:
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(1)
meet = {
    "wait": processes.wait_for_everyone,
    "same": lambda: processes.check_same("data", "a", "Give the same."),
    "on main": lambda: processes.as_on_main(lambda: 1, ValueError),
    "fill": lambda: sharded_cache.fill((int(rank), 2), [], 1, None, None, "items"),
}
for name in calls:
    try:
        meet[name]()
    except processes.UserError as error:
        print(f"{name}: {error}", flush=True)
os._exit(0)
"""


@pytest.mark.parametrize("killed", [0, 1])
def test_each_meeting_with_a_process_that_was_killed_ends_with_an_error_that_says_so(killed):
    # The main one's broadcast needs no answer, so that it alone may not notice.
    calls = ["wait", "same", "fill"] + ["on main"] * (killed == 0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    two = []
    for rank in map(str, range(2)):
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        launched = {"ACCELERATE_USE_CPU": "true", "ACCELERATE_MIXED_PRECISION": "no"}
        command = [sys.executable, "-c", SURVIVE, str(killed), *calls]
        environment = os.environ | address | numbers | launched
        two.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    (_, _), (shown, errors) = two[killed].communicate(timeout=120), two[1 - killed].communicate(timeout=120)
    assert two[killed].returncode == -signal.SIGKILL
    assert two[1 - killed].returncode == 0, errors
    lines = shown.splitlines()
    assert [line.split(":")[0] for line in lines] == calls
    assert all("Another process of this run has ended (" in line for line in lines)


@pytest.mark.parametrize("asked_for", ["true", "false"])
def test_a_run_that_finds_no_gpu_says_so(asked_for):
    """A driver that does not work would look like a run that is very slow."""
    script = "import os; from rasengan import processes; print(processes.make_accelerator(os.environ, 'no').device)"
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": asked_for}
    finished = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert finished.stdout == "cpu\n"
    assert ("PyTorch finds no GPU" in finished.stderr) == (asked_for == "false")


def test_an_accumulation_of_the_environment_does_not_divide_gradients_once_more():
    script = "import os, torch; from rasengan import processes; p = torch.nn.Parameter(torch.ones(())); "
    script += "processes.make_accelerator(os.environ, 'no').backward(8 * p); print(p.grad.item())"
    environment = os.environ | {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.stdout == "8.0\n", done.stderr

"""Signals, the deadline and the command to resume by, each in a process of its own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rasengan import stopping


WAIT = """
import sys, time
from rasengan.stopping import Stopper
stopper = Stopper(None, time.monotonic(), lambda text: print(text, file=sys.stderr, flush=True))
print("ready", flush=True)
while not stopper.due():
    time.sleep(0.01)
print(stopper.reason(), flush=True)
time.sleep(60 if "linger" in sys.argv else 0)
sys.exit(stopper.exit_code())
"""


def start(*words):
    process = subprocess.Popen(
        [sys.executable, "-c", WAIT, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_for_an_end_and_is_told(number):
    process = start()
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert out == f"{number.name} was received\n"
    assert f"{number.name}: ending soon, with a checkpoint of the steps" in err
    assert process.returncode == 128 + number


def test_a_second_interrupt_ends_at_once():
    process = start("linger")
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "SIGINT was received\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == 130


def test_an_interrupt_after_a_sigterm_ends_at_once():
    process = start("linger")
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "SIGTERM was received\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == 130


def test_a_second_sigterm_ends_nothing_more():
    # The launcher's death sends one after the launcher's own.
    process = start("linger")
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "SIGTERM was received\n"
    process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.5)
    process.kill()
    process.communicate()


def test_a_deadline_is_counted_from_the_start_and_is_a_clean_end():
    before = signal.getsignal(signal.SIGINT)  # in the background of a shell it is ignored
    stopper = stopping.Stopper(1, time.monotonic() - 59, print)
    try:
        assert not stopper.due()
        stopper.deadline_s -= 1
        assert stopper.due()
        assert (stopper.reason(), stopper.exit_code()) == ("--max_train_minutes is over", 0)
    finally:
        stopper.release()
    assert signal.getsignal(signal.SIGINT) is before


LOOK = "import os; from rasengan import stopping; stopping.end_with_launcher(os.environ)"


@pytest.mark.parametrize(
    ("name", "status"), [("ACCELERATE_DYNAMO_USE_FULLGRAPH", 128 + signal.SIGTERM), ("ACCELERATE_MIXED_PRECISION", 0)]
)
def test_a_process_whose_parent_is_no_launcher_any_more_ends_by_itself(name, status):
    # A shell stands for what takes over an orphan; its own words must not name Python.
    command = ["sh", "-c", '"$INTERPRETER" -c "$LOOK"; exit $?']
    environment = os.environ | {"INTERPRETER": sys.executable, "LOOK": LOOK, name: "no"}
    assert subprocess.run(command, env=environment).returncode == status


def test_a_launcher_that_another_program_calls_is_one():
    environment = os.environ | {"ACCELERATE_DYNAMO_USE_FULLGRAPH": "False"}
    program = f"import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', {LOOK!r}]).returncode)"
    assert subprocess.run([sys.executable, "-"], input=program, text=True, env=environment).returncode == 0


def test_a_process_ends_with_its_launcher():
    child = "import os, time; from rasengan.stopping import end_with_launcher; end_with_launcher(os.environ); "
    child += "print(os.getpid(), flush=True); time.sleep(60)"
    launcher = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}]).wait()"
    environment = os.environ | {"ACCELERATE_DYNAMO_USE_FULLGRAPH": "False"}
    process = subprocess.Popen([sys.executable, "-c", launcher], stdout=subprocess.PIPE, text=True, env=environment)
    pid = int(process.stdout.readline())
    process.kill()
    process.wait()
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists():
            return
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("it lives on as an orphan")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["train.py", "--rank", "4"], f"{sys.executable} train.py --rank 4 --resume_from_checkpoint latest"),
        (
            ["train.py", "--resume_from_checkpoint", "checkpoint-2", "--seed", "1"],
            f"{sys.executable} train.py --seed 1 --resume_from_checkpoint latest",
        ),
        (
            ["train.py", "--hub_token", "hf_secret", "--seed=1"],
            f"{sys.executable} train.py --seed=1 --resume_from_checkpoint latest",
        ),
        (
            ["train.py", "--hub_token=hf_secret", "--validation_prompt", "a red star"],
            f"{sys.executable} train.py --validation_prompt 'a red star' --resume_from_checkpoint latest",
        ),
    ],
)
def test_the_command_to_resume_by_is_the_runs_own_without_a_token(words, expected):
    assert stopping.resume_command(words, ["bash"]) == expected
    launched = ["python", "accelerate", "launch", "--cpu", *words]
    assert stopping.resume_command(words, launched) == expected.replace(sys.executable, "accelerate launch --cpu", 1)


@pytest.mark.parametrize(
    ("launcher", "kept"),
    [
        (["/v/bin/python", "/v/bin/accelerate", "launch", "--cpu"], "accelerate launch --cpu"),
        (
            ["/v/bin/python", "/v/bin/accelerate-launch", "--config_file", "c.yaml"],
            "/v/bin/python /v/bin/accelerate-launch --config_file c.yaml",
        ),
        (["/v/bin/python", "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu"], "accelerate launch --cpu"),
        (
            ["/v/bin/python", "-m", "accelerate.commands.launch", "--cpu"],
            "/v/bin/python -m accelerate.commands.launch --cpu",
        ),
        (
            ["/v/bin/python", "/v/bin/torchrun", "--nproc_per_node", "2"],
            "/v/bin/python /v/bin/torchrun --nproc_per_node 2",
        ),
        (
            ["/v/bin/python", "-u", "-m", "torch.distributed.run", "--nproc_per_node=2"],
            "/v/bin/python -u -m torch.distributed.run --nproc_per_node=2",
        ),
        (["bash", "-c"], None),
        (["/usr/bin/timeout", "9", "/v/bin/python"], None),
        (["/v/bin/python", "/v/bin/pytest"], None),
        (["/v/bin/python", "sweep.py", "launch"], None),
    ],
    ids=str,
)
def test_the_command_to_resume_by_keeps_the_words_of_any_launcher(launcher, kept):
    words = ["/here/train.py", "--seed", "1", "--hub_token=hf_secret"]
    expected = f"{kept or sys.executable} /here/train.py --seed 1 --resume_from_checkpoint latest"
    assert stopping.resume_command(words, [*launcher, *words]) == expected


def test_the_command_to_resume_by_has_its_launcher(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        "import sys\nfrom rasengan.stopping import launcher_words, resume_command\n"
        "print(resume_command(sys.argv, launcher_words()))\n"
    )
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "--mixed_precision", "no"]
    finished = subprocess.run([*launch, script, "--seed", "1"], capture_output=True, text=True, timeout=120)
    expected = f"accelerate launch --cpu --mixed_precision no {script} --seed 1 --resume_from_checkpoint latest"
    assert finished.stdout.strip() == expected, finished.stderr

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


TOGETHER = """
import os, signal, sys, time
import torch
from rasengan import stopping
signal.signal(signal.SIGINT, signal.default_int_handler)  # as the script: a job in the background ignores it
stopping.raise_on_sigterm()
stopping.end_while_waiting(lambda number: print(f"ended by {number}", file=sys.stderr, flush=True))
if "fork" in sys.argv:
    child = os.fork()
    if child == 0:
        try:
            time.sleep(60)
        except stopping.Terminated:
            os._exit(3)
    time.sleep(0.5)
    os.kill(child, 15)
    print(os.waitpid(child, 0)[1], flush=True)
    time.sleep(stopping.UNHEARD_S + 1)
    sys.exit(0)
rank = int(sys.argv[2])
torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=rank, world_size=2)
if "stopper" in sys.argv:
    stopper = stopping.Stopper(None, time.monotonic(), print)
    print("ready", flush=True)
    while not stopper.due():
        time.sleep(0.01)
    stopper.release()
print("ready", flush=True)
if rank == 0:
    torch.distributed.barrier()
time.sleep(60)
"""


def start_together(tmp_path, *words):
    return [
        subprocess.Popen(
            [sys.executable, "-c", TOGETHER, tmp_path / "met", str(rank), *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_process_that_waits_for_another_ends_with_a_word(number, tmp_path):
    waiting, other = start_together(tmp_path)
    try:
        assert waiting.stdout.readline() == "ready\n"
        time.sleep(0.3)  # it waits in the barrier now, in C++
        waiting.send_signal(number)
        assert waiting.communicate(timeout=10)[1].endswith(f"ended by {number}\n")
        assert waiting.returncode == 128 + number
    finally:
        other.kill()
        other.communicate()
        waiting.kill()


def test_a_process_whose_terminal_is_gone_ends_too(tmp_path):
    waiting, other = start_together(tmp_path)
    try:
        assert waiting.stdout.readline() == "ready\n"
        waiting.stderr.close()
        time.sleep(0.3)
        waiting.terminate()
        assert waiting.wait(timeout=10) == 128 + signal.SIGTERM
    finally:
        other.kill()
        other.communicate()
        waiting.kill()


def test_a_stopper_takes_the_signals_over_until_its_release(tmp_path):
    waiting, other = start_together(tmp_path, "stopper")
    try:
        assert waiting.stdout.readline() == "ready\n"
        waiting.terminate()
        assert "SIGTERM: ending soon" in waiting.stdout.readline()
        assert waiting.stdout.readline() == "ready\n"
        time.sleep(0.3)
        waiting.terminate()
        assert waiting.communicate(timeout=10)[1].endswith("ended by 15\n")
    finally:
        other.kill()
        other.communicate()
        waiting.kill()


def test_the_signal_of_a_forked_child_is_not_its_parents():
    done = subprocess.run([sys.executable, "-c", TOGETHER, "fork"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert (done.stdout, done.stderr) == (f"{3 << 8}\n", "")  # the child's own handler ended it


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


@pytest.mark.parametrize(
    ("minutes", "did_nothing", "said"),
    [
        (0, False, "Ended after 3 of 4 steps, since --max_train_minutes is over. Go on with:\n  go on"),
        (
            0,
            True,
            "Ended after 3 of 4 steps, since --max_train_minutes is over. The time was over before the first step: "
            "give it more. Go on with:\n  go on",
        ),
        (None, False, "Ended after 3 of 4 steps, since another process was asked to end. Go on with:\n  go on"),
    ],
)
def test_an_end_is_told_with_its_reason_and_how_to_go_on(minutes, did_nothing, said):
    told = []
    stopper = stopping.Stopper(minutes, time.monotonic(), told.append)
    stopper.release()
    stopper.say_ended("after 3 of 4 steps", "go on", did_nothing)
    assert told == [said]


def test_a_signal_before_the_first_step_is_no_time_that_was_too_short():
    told = []
    stopper = stopping.Stopper(0, time.monotonic(), told.append)
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        stopper.release()
    stopper.say_ended("after 0 of 4 steps", "go on", did_nothing=True)
    assert told[1:] == ["Ended after 0 of 4 steps, since SIGTERM was received. Go on with:\n  go on"]


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

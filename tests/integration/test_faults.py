"""Runs that are asked to end, killed, crowded out or starved: nothing is lost, and the error says what happened."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rasengan import UserError, checkpoint, demo, drawing, manifest, validation_loss
from rasengan.adamw_8bit import AdamW8bit
from rasengan.locks import LOCK_FILE


ROOT = Path(__file__).parents[2]
ADAPTER = "pytorch_lora_weights.safetensors"
LAUNCH = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
ONE = [*LAUNCH, "--cpu", "--mixed_precision", "no"]
TWO = [*LAUNCH, "--config_file", str(ROOT / "accelerate_configs" / "cpu.yaml")]
TWO += ["--main_process_port", "0", "--num_processes", "2"]
LONG = ["--max_train_steps", 100000, "--checkpointing_steps", 100000, "--logging_steps", 2, "--report_to", "none"]


def bits(folder) -> dict[str, bytes]:
    return {key: tensor.numpy().tobytes() for key, tensor in load_file(folder / ADAPTER).items()}


@pytest.fixture
def start(train_arguments, tmp_path):
    """Function that starts a long run in a process group of its own, and waits until it has made some steps."""
    started = []

    def run(*flags, launch=(sys.executable,), output_dir=tmp_path / "run"):
        words = [*launch, ROOT / "scripts" / "train_lora_sdxl.py", *train_arguments, *LONG, *flags]
        log = open(tmp_path / "log", "w+")
        process = subprocess.Popen(
            [*map(str, words), "--output_dir", str(output_dir)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "RUN_OF_TEST": str(tmp_path)},
            start_new_session=True,
        )
        process.name = str(tmp_path)
        started.append(process)
        text = lambda: (tmp_path / "log").read_text(errors="replace")  # noqa: E731
        wait_for(lambda: re.search(r"[1-9]\d*/100000", text()) or process.poll() is not None, text)
        assert process.poll() is None, text()
        return process, text

    yield run
    for process in started:
        for pid in processes_of(process):
            os.kill(pid, signal.SIGKILL)
        process.wait()


def wait_for(condition, text=lambda: "", limit_s=90):
    until_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < until_s, text()
        time.sleep(0.05)


def processes_of(run: subprocess.Popen) -> dict[int, dict[str, str]]:
    """Return the processes of a run that have not ended, each with its environment; a launcher moves them apart."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        environment = dict(word.decode(errors="replace").split("=", 1) for word in words if b"=" in word)
        if environment.get("RUN_OF_TEST") == run.name:
            found[int(folder.name)] = environment
    return found


# --- asked to end ---


WORKER = ["--dataloader_num_workers", 1]
SLOW = ["--gradient_accumulation_steps", 30, "--logging_steps", 100000]


@pytest.mark.parametrize(
    ("number", "launch", "to_group", "flags"),
    [
        (signal.SIGTERM, (sys.executable,), False, []),
        (signal.SIGINT, (sys.executable,), True, WORKER),
        (signal.SIGTERM, ONE, False, []),
        (signal.SIGINT, ONE, True, WORKER),
        (signal.SIGTERM, TWO, False, SLOW),
    ],
    ids=["SIGTERM", "Ctrl-C", "SIGTERM to accelerate launch", "Ctrl-C under accelerate launch", "SIGTERM, two, slow"],
)
def test_a_run_that_is_asked_to_end_saves_and_says_how_to_go_on(number, launch, to_group, flags, start, tmp_path):
    process, text = start(*flags, launch=launch)
    (os.killpg if to_group else os.kill)(process.pid, number)
    process.wait(timeout=60)
    wait_for(lambda: not processes_of(process), text)  # no orphan is left
    (saved,) = checkpoint.list_checkpoints(tmp_path / "run")
    assert checkpoint.find_damage(saved) is None
    step = int(saved.name.split("-")[1])
    assert re.search(
        rf"Ended after {step} of 100000 steps, since .*Go on with:\n  .*--resume_from_checkpoint latest\n", text()
    )
    if len(launch) > 1:
        assert re.search(r"\n  accelerate launch .*train_lora_sdxl\.py", text())
    assert not (tmp_path / "run" / LOCK_FILE).exists()
    assert process.returncode != 0


@pytest.mark.parametrize("launch", [[sys.executable], TWO], ids=["alone", "two"])
def test_sigterm_before_the_first_step_is_said_and_leaves_no_lock(launch, train_arguments, tmp_path):
    words = [*launch, ROOT / "scripts" / "train_lora_sdxl.py", *train_arguments, *LONG]
    words += ["--conditioning_cache_dir", tmp_path / "cache", "--output_dir", tmp_path / "run"]
    process = subprocess.Popen([*map(str, words)], stderr=subprocess.PIPE, text=True)
    wait_for(lambda: (tmp_path / "run" / LOCK_FILE).exists() or process.poll() is not None)
    process.terminate()
    said = process.communicate(timeout=60)[1]
    assert process.returncode != 0
    assert "Ended by SIGTERM. What was finished before is whole. Then go on with --resume_from_checkpoint" in said
    if launch == TWO:
        return  # a process that waits for another is ended where it is: its lock is a dead one's
    assert process.returncode == 128 + signal.SIGTERM, said
    assert "Traceback" not in said
    assert not (tmp_path / "run" / LOCK_FILE).exists()


def test_the_deadline_ends_drawing_too(train, monkeypatch, capfd, tmp_path):
    drawn, draw = [], drawing.draw

    def draw_one(*arguments, **options):
        drawn.append(1)
        return draw(*arguments, **options)

    monkeypatch.setattr(drawing, "draw", draw_one)
    show = ["--validation_prompt", "a star", "--num_validation_images", 30, "--validation_inference_steps", 2]
    train(*show, "--max_train_minutes", 0.001, output_dir=tmp_path / "run")
    assert len(drawn) == 1  # the one that saw that it is over
    said = capfd.readouterr().out
    assert "Ended after 0 of 4 steps, since --max_train_minutes is over. The time was over before the first" in said


def test_ctrl_c_into_a_pipe_that_has_ended_saves_too(train_arguments, tmp_path):
    words = [
        sys.executable,
        ROOT / "scripts" / "train_lora_sdxl.py",
        *train_arguments,
        *LONG,
        "--output_dir",
        tmp_path,
    ]
    process = subprocess.Popen([*map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    seen = b""
    while not re.search(rb"[1-9]\d*/100000", seen):
        seen += process.stdout.read1()
    process.stdout.close()  # as `tee` does at Ctrl-C
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    (saved,) = checkpoint.list_checkpoints(tmp_path)
    assert checkpoint.find_damage(saved) is None


def test_a_launcher_that_dies_during_the_imports_leaves_no_orphan(train_arguments, tmp_path):
    words = [*ONE, ROOT / "scripts" / "train_lora_sdxl.py", *train_arguments, *LONG, "--output_dir", tmp_path / "run"]
    environment = os.environ | {"RUN_OF_TEST": str(tmp_path)}
    process = subprocess.Popen([*map(str, words)], stderr=subprocess.DEVNULL, env=environment)
    process.name = str(tmp_path)
    wait_for(lambda: len(processes_of(process)) > 1)  # the script has started, and imports
    time.sleep(0.5)
    process.kill()
    process.wait()
    wait_for(lambda: not processes_of(process), limit_s=20)


def test_a_script_whose_launcher_is_gone_at_its_first_line_ends(train_arguments, tmp_path):
    words = [sys.executable, ROOT / "scripts" / "train_lora_sdxl.py", *train_arguments, *LONG]
    words += ["--output_dir", tmp_path]
    late = f"(sleep 1; exec {shlex.join(map(str, words))}) &"
    environment = os.environ | {"RUN_OF_TEST": str(tmp_path), "ACCELERATE_DYNAMO_USE_FULLGRAPH": "False"}
    process = subprocess.Popen(["sh", "-c", late], stderr=subprocess.DEVNULL, env=environment)
    process.name = str(tmp_path)
    process.wait()
    wait_for(lambda: not processes_of(process))
    assert not list(tmp_path.iterdir())


def test_a_run_past_its_deadline_ends_cleanly_and_goes_on_to_the_same_adapter(train, trained, capfd, tmp_path):
    train("--max_train_minutes", 0, output_dir=tmp_path)
    (saved,) = checkpoint.list_checkpoints(tmp_path)
    assert saved.name == "checkpoint-1"
    assert "Ended after 1 of 4 steps, since --max_train_minutes is over" in capfd.readouterr().out
    assert not (tmp_path / ADAPTER).exists()
    train("--resume_from_checkpoint", "latest", output_dir=tmp_path)
    assert bits(tmp_path) == bits(trained)


def test_a_signal_while_the_end_is_measured_loses_nothing(train, monkeypatch, tmp_path):
    """The last step has a checkpoint, whatever the cadence is, and the adapter is written before the run ends."""
    measure = validation_loss.ValidationLoss.measure_tuned

    def measure_under_a_signal(self, step):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return measure(self, step)

    monkeypatch.setattr(validation_loss.ValidationLoss, "measure_tuned", measure_under_a_signal)
    train(*("--max_train_steps", 3, "--validation_split", 2, "--validation_loss_steps", 50), output_dir=tmp_path)
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-3"]
    assert bits(tmp_path) == bits(tmp_path / "checkpoint-3")


@pytest.mark.parametrize("what", ["pictures", "loss"])
def test_a_signal_while_a_run_validates_is_answered_at_once_and_loses_nothing(
    what, train, trained, monkeypatch, read_scalars, capfd, tmp_path
):
    """A launcher of several processes kills what has not ended after 30 s."""
    calls, cadence = [], ["--checkpointing_steps", 1000, "--logging_steps", 10]
    flags = {
        "loss": ["--validation_split", 2, "--validation_loss_steps", 2],
        "pictures": ["--validation_prompt", "a star", "--max_train_samples", 4, "--num_validation_images", 1],
    }[what]
    flags += ["--validation_inference_steps", 3] * (what == "pictures")
    whole = train(*flags, *cadence)
    place, name = (validation_loss.ValidationLoss, "_losses") if what == "loss" else (drawing.Denoiser, "__call__")
    original = getattr(place, name)

    def call_under_a_signal(self, *arguments):
        calls.append(1)
        # After what is done of the base before the first step.
        if len(calls) == base_calls + 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *arguments)

    monkeypatch.setattr(place, name, call_under_a_signal)
    base_calls = {"loss": 4, "pictures": 3}[what]
    train(*flags, *cadence, output_dir=tmp_path)
    assert len(calls) == base_calls + 1, "what was begun is not ended"
    printed = capfd.readouterr().out
    assert re.search(r"Ended after \d of 4 steps, since SIGTERM was received. Go on with:", printed)
    (saved,) = checkpoint.list_checkpoints(tmp_path)
    monkeypatch.setattr(place, name, original)
    train(*flags, *cadence, "--resume_from_checkpoint", "latest", output_dir=tmp_path)
    assert bits(tmp_path) == bits(whole)
    names = ["train_loss", "grad_norm"] + ["validation_loss"] * (what == "loss")
    assert all(read_scalars(tmp_path, name) == read_scalars(whole, name) for name in names)


def test_an_update_for_which_the_memory_does_not_suffice_is_no_part_of_what_is_resumed(
    train, monkeypatch, read_scalars, tmp_path
):
    whole, update, updates = train(), AdamW8bit.step, []

    def update_in_part(self, *arguments):
        updates.append(1)
        if len(updates) == 4:
            with torch.no_grad():
                self.param_groups[0]["params"][0][:100] += 1
            raise torch.OutOfMemoryError
        return update(self, *arguments)

    monkeypatch.setattr(AdamW8bit, "step", update_in_part)
    with pytest.raises(UserError, match="^Out of memory; checkpoint-2 is where to resume, with "):
        train(output_dir=tmp_path)
    monkeypatch.setattr(AdamW8bit, "step", update)
    train("--resume_from_checkpoint", "latest", output_dir=tmp_path)
    assert bits(tmp_path) == bits(whole)
    assert read_scalars(tmp_path, "train_loss") == read_scalars(whole, "train_loss")


def test_two_processes_that_validate_end_together_when_they_are_asked(start, tmp_path):
    validates = ["--validation_split", 16, "--validation_loss_steps", 1]  # for most of the time
    process, text = start(*validates, "--validation_prompt", "a star", "--num_validation_images", 2, launch=TWO)
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=28)  # its launcher waits 30 s, and then kills
    wait_for(lambda: not processes_of(process), text)
    (saved,) = checkpoint.list_checkpoints(tmp_path / "run")
    assert checkpoint.find_damage(saved) is None
    assert f"Ended after {checkpoint.step_of(saved)} of 100000 steps, since SIGTERM was received" in text()


def test_checkpoints_by_the_clock(train, trained, tmp_path):
    train("--checkpointing_minutes", 0, "--checkpointing_steps", 1000, output_dir=tmp_path)
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path)] == [f"checkpoint-{n}" for n in (1, 2, 3, 4)]
    assert bits(tmp_path) == bits(trained)


# --- killed, in parts ---


def test_where_one_process_is_killed_the_others_end_and_it_is_named(start, tmp_path):
    process, text = start(launch=TWO)
    ranks = {environment.get("RANK"): pid for pid, environment in processes_of(process).items()}
    os.kill(ranks["1"], signal.SIGKILL)
    process.wait(timeout=60)
    wait_for(lambda: not processes_of(process), text)
    assert process.returncode != 0
    (saved,) = checkpoint.list_checkpoints(tmp_path / "run")
    assert checkpoint.find_damage(saved) is None
    assert re.search(
        rf"error: Another process of this run has ended \(.* The last checkpoint is {saved.name}\.", text()
    )
    assert re.search(r"local_rank: 1|rank +: 1", text())  # the launcher says which


def test_a_data_worker_that_is_killed_ends_the_run_with_a_checkpoint(start, tmp_path):
    process, text = start("--dataloader_num_workers", 1)
    workers = [pid for pid in processes_of(process) if pid != process.pid]
    worker = max(workers)  # the newest process; multiprocessing's helpers are older
    os.kill(worker, signal.SIGKILL)
    process.wait(timeout=60)
    assert process.returncode == 2, text()
    assert re.search(r"error: A process that loads samples ended in step \d+: .*--dataloader_num_workers", text())
    (saved,) = checkpoint.list_checkpoints(tmp_path / "run")
    assert f"Resume from {saved.name}" in text()
    assert checkpoint.find_damage(saved) is None


def test_an_error_in_the_loop_does_not_wait_for_the_workers_forever(start, tmp_path):
    process, text = start("--dataloader_num_workers", 1, "--checkpointing_steps", 5)
    shutil.rmtree(tmp_path / "run")
    process.wait(timeout=60)
    assert process.returncode == 2, text()
    assert re.search(r"\nerror: .*checkpoint-\d+ cannot be written: No such file", text())  # not behind the bar
    assert not processes_of(process)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_changes_under_the_run_ends_it_with_a_checkpoint(start, picture_set, tmp_path, workers):
    pictures = shutil.copytree(picture_set, tmp_path / "set")
    flags = ["--train_data_dir", pictures, "--no-center_crop", "--dataloader_num_workers", workers]
    process, text = start(*flags)
    for name in ("0000.jpg", "0001.png"):
        (pictures / name).write_bytes(b"")
    for file in [file for file in pictures.iterdir() if file.stat().st_size and file.suffix != ".jsonl"]:
        file.unlink()
    process.wait(timeout=60)
    assert process.returncode == 2, text()
    said = r"error: .*set/\d{4}\.\w+ was changed while the run used it: .*\. Put back .*, and resume from (.*) with"
    (saved,) = checkpoint.list_checkpoints(tmp_path / "run")
    assert re.search(said, text())[1] == saved.name
    assert "Traceback" not in text()


# --- two at once ---


def test_a_second_run_in_the_same_folder_is_refused(start, train, loaded, tmp_path):
    process, _ = start()
    with pytest.raises(UserError, match=rf"{tmp_path / 'run'} is in use by another run \(process {process.pid} on "):
        train(output_dir=tmp_path / "run")
    assert loaded == []
    process.kill()
    process.wait()
    train("--max_train_steps", 1, "--report_to", "none", output_dir=tmp_path / "run")
    assert (tmp_path / "run" / ADAPTER).is_file()


# --- the cache ---


def test_a_shard_that_was_damaged_on_the_disk_is_built_again(train, trained, tmp_path):
    cache = ["--conditioning_cache_dir", tmp_path / "cache"]
    train(*cache, "--max_train_steps", 1, "--report_to", "none")
    shards = sorted((tmp_path / "cache").rglob("*.safetensors"))
    before = {shard: shard.read_bytes() for shard in shards}
    for shard, content in before.items():
        middle = len(content) // 2
        shard.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    assert bits(train(*cache)) == bits(trained)
    assert {shard: shard.read_bytes() for shard in shards} == before


# --- numbers gone wrong ---


@pytest.mark.parametrize(
    "flags", [[], ["--train_text_encoder"], ["--validation_split", 2]], ids=["plain", "text encoders", "held out"]
)
def test_an_adapter_that_its_last_update_ruined_is_not_written_over_a_good_one(flags, train, tmp_path):
    run = [*flags, "--lr_scheduler", "piecewise_constant", "--lr_step_rules", "1:3,1e37", "--checkpointing_steps", 1]
    good = bits(train(*run, "--max_train_steps", 3, output_dir=tmp_path))
    said = r"After the last step the loss is nan with the adapter, and \d\.\d+ without"
    resume = ["--resume_from_checkpoint", "latest", "--checkpoints_total_limit", 1, "--max_train_steps", 4]
    for _ in range(2):  # the second time nothing is left to train
        with pytest.raises(UserError, match=said):
            train(*run, *resume, output_dir=tmp_path)
        assert bits(tmp_path) == good
        assert [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(tmp_path)][-2:] == [3, 4]


def test_a_run_that_stands_still_stops_and_names_step_samples_and_module(train, tmp_path):
    run = ["--max_train_steps", 60, "--checkpointing_steps", 1, "--logging_steps", 7, "--no-use_8bit_adam"]
    with pytest.raises(UserError) as caught:
        train(*run, "--learning_rate", 1e30, "--max_train_samples", 4, output_dir=tmp_path)
    message = str(caught.value)
    assert re.match(r"25 steps in a row had no finite gradient, up to step 26 with .*\.(png|jpg|webp)", message), (
        message
    )
    assert re.search(r"\w+ is the first of the UNet's modules whose output is not finite", message), message
    assert "lower --learning_rate, and start again" in message  # the weights of its checkpoints are ruined
    assert not (tmp_path / ADAPTER).exists()


# --- captions ---


def test_captions_that_are_too_long_are_counted_with_examples(train, caplog, tmp_path):
    demo.draw_picture_set(tmp_path, count=4)
    lines = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    lines[1]["text"] = "red " * 90 + "the end of it"
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    train("--train_data_dir", tmp_path, "--max_train_steps", 1, "--report_to", "none")
    (message,) = [r.getMessage() for r in caplog.records if r.name == "rasengan.captions"]
    assert message.startswith(
        f"1 of 4 captions are longer than the 77 tokens that the text encoders see: {lines[1]['file_name']}"
    )
    assert re.search(r"\(\d+ tokens, unseen: '.*red red", message)


# --- the harness ---


def test_kills_at_random_moments_change_no_bit(tmp_path):
    command = [sys.executable, ROOT / "benchmarks" / "faults.py", "--kills", "6", "--processes", "1"]
    command += ["--disk_sizes", "0", "--shrinks", "0", "--out", tmp_path / "faults.json", "--seed", "7"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    (run,) = json.loads((tmp_path / "faults.json").read_text())["runs"]
    assert run["kills"] >= 6
    assert run["equal"] == run["runs"]
    assert run["losses_equal"] == f"{24 * run['runs']} of {24 * run['runs']}"


def test_no_checkpoint_is_removed_for_those_of_steps_without_a_finite_gradient(train, caplog, tmp_path):
    """The loss stays finite here: one update ruins the weights, and the gradients after it show that."""
    run = ["--lr_scheduler", "piecewise_constant", "--lr_step_rules", "1:4,1e6", "--learning_rate", 1e-3]
    run += ["--checkpointing_steps", 2, "--checkpoints_total_limit", 1, "--report_to", "none"]
    run += ["--max_train_samples", 4, "--max_train_steps", 100]
    with pytest.raises(
        UserError, match=r"25 steps in a row had no finite gradient.*, and go on from checkpoint-4, the"
    ):
        train(*run, output_dir=tmp_path)
    names = [path.name for path in checkpoint.list_checkpoints(tmp_path)]
    assert "checkpoint-4" in names
    # Gone on with, it is no better, and the same one is the last good one.
    with pytest.raises(
        UserError, match=r"2\d steps in a row had no finite gradient.*, and go on from checkpoint-4, the"
    ):
        train(*run, "--resume_from_checkpoint", "latest", output_dir=tmp_path)
    assert "steps before it had no finite gradient: its weights may be ruined" in caplog.text
    for path in checkpoint.list_checkpoints(tmp_path):
        if path.name != "checkpoint-4":
            shutil.rmtree(path)
    train(
        *run[2:],
        "--resume_from_checkpoint",
        "latest",
        "--resume_with_changes",
        "--max_train_steps",
        6,
        output_dir=tmp_path,
    )


def test_a_checkpoint_whose_adapter_is_not_finite_is_damaged(train, trained, tmp_path):
    folder = tmp_path / "checkpoint-4"
    shutil.copytree(trained / "checkpoint-4", folder)
    file = folder / ADAPTER
    tensors, metadata = load_file(file), safe_open(file, framework="pt").metadata()
    next(iter(tensors.values()))[0] = float("nan")
    save_file(tensors, file, metadata)
    (folder / "manifest.json").unlink()
    manifest.write_manifest(folder)
    with pytest.raises(UserError, match="checkpoint-4 is damaged: its adapter is not finite"):
        train("--resume_from_checkpoint", "latest", "--max_train_steps", 6, output_dir=tmp_path)

import json
import logging
import os
import subprocess
import sys
import threading
import time

import pytest

from rasengan import UserError, locks, stopping


def lock_file(folder):
    return folder / locks.LOCK_FILE


def test_a_folder_is_locked_and_released(tmp_path):
    with locks.only_run(tmp_path, is_first=True):
        assert json.loads(lock_file(tmp_path).read_text())["pid"] == os.getpid()
        with pytest.raises(UserError, match=rf"in use by another run \(process {os.getpid()} on .*--output_dir"):
            locks.RunLock(tmp_path)
    assert not lock_file(tmp_path).exists()


def test_the_other_processes_of_a_run_take_no_lock(tmp_path):
    with locks.only_run(tmp_path, is_first=False):
        assert not lock_file(tmp_path).exists()


def test_a_folder_that_was_made_for_nothing_is_removed_again(tmp_path):
    with locks.only_run(tmp_path / "a" / "b", is_first=True):
        assert lock_file(tmp_path / "a" / "b").exists()
    assert not (tmp_path / "a").exists()
    with locks.only_run(tmp_path / "a" / "b", is_first=True):
        (tmp_path / "a" / "b" / "result").touch()
    assert (tmp_path / "a" / "b" / "result").exists()


def test_a_folder_in_the_place_of_a_lock_is_told_of_at_once(tmp_path):
    (tmp_path / locks.LOCK_FILE).mkdir()
    with pytest.raises(UserError, match=r"\.lock is a folder, where this run's lock is to be. Remove it"):
        locks.RunLock(tmp_path)


def test_the_lock_of_a_process_that_was_killed_is_stale(tmp_path, caplog):
    code = "import sys, time; from pathlib import Path; from rasengan.locks import RunLock; "
    code += "lock = RunLock(Path(sys.argv[1])); print('locked', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "locked\n"
    with pytest.raises(UserError, match=f"process {process.pid}"):
        locks.RunLock(tmp_path)
    process.kill()
    process.wait()
    locks.RunLock(tmp_path).release()
    assert "left behind by a run that ended without warning" in caplog.text


def test_a_process_number_that_was_given_again_is_no_owner(tmp_path):
    owner = {"machine": locks._machine(), "host": "here", "pid": os.getpid(), "started": "1", "token": "x"}
    lock_file(tmp_path).write_text(json.dumps(owner))
    locks.RunLock(tmp_path).release()


def test_a_lock_from_the_future_is_not_waited_for_until_then(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "LOOKS_S", 0.05)
    monkeypatch.setattr(locks, "STALE_S", 0.5)
    lock_file(tmp_path).touch()
    os.utime(lock_file(tmp_path), (time.time() + 5, time.time() + 5))
    began_s = time.monotonic()
    locks.RunLock(tmp_path).release()
    assert time.monotonic() - began_s < 3


@pytest.mark.parametrize("content", ['{"machine": "another", "host": "far", "pid": 1, "token": "x"}', "", "[]"])
def test_the_lock_of_another_machine_is_stale_by_its_age(content, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(locks, "LOOKS_S", 0.05)
    lock_file(tmp_path).write_text(content)
    renewal = threading.Timer(0.3, os.utime, [lock_file(tmp_path)])
    renewal.start()
    with pytest.raises(UserError, match="in use by another run"):
        locks.RunLock(tmp_path)
    assert "waiting whether it lives" in caplog.text
    old = time.time() - locks.STALE_S - 1
    os.utime(lock_file(tmp_path), (old, old))
    # The clock of this machine has no say in it.
    monkeypatch.setattr(time, "time", lambda: 0.0)
    locks.RunLock(tmp_path).release()
    assert list(tmp_path.iterdir()) == []


def test_the_lock_of_another_machine_that_is_not_renewed_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "LOOKS_S", 0.05)
    monkeypatch.setattr(locks, "STALE_S", 0.5)
    lock_file(tmp_path).write_text('{"machine": "another", "host": "far", "pid": 1, "token": "x"}')
    locks.RunLock(tmp_path).release()


def test_a_container_with_other_process_numbers_is_another_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "LOOKS_S", 0.05)
    monkeypatch.setattr(locks, "RENEWED_S", 0.1)
    lock = locks.RunLock(tmp_path)
    monkeypatch.setattr(locks, "_process_start", lambda pid: None)  # as from inside of another container
    monkeypatch.setattr(locks, "_machine", lambda: "another namespace")
    with pytest.raises(UserError, match="in use by another run"):
        locks.RunLock(tmp_path)
    lock.release()


def test_a_disk_that_is_full_leaves_no_lock_behind(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(json, "dump", full)
    with pytest.raises(OSError, match="No space left"):
        locks.RunLock(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []


def test_what_killed_runs_left_is_removed(tmp_path):
    left = [".export-abc", ".saving-3", ".removing-2", f".args.json.{32 * 'a'}", f".lock.{32 * '0'}"]
    kept = [".cache", "checkpoint-2", ".notes.txt", f"args.json.{32 * 'a'}"]
    for name in left + kept:
        (tmp_path / name).mkdir() if name.startswith((".export", ".saving", ".removing")) else (
            tmp_path / name
        ).touch()
    with locks.only_run(tmp_path, is_first=True):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)


def test_a_lock_is_renewed_while_it_is_held(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "RENEWED_S", 0.05)
    lock = locks.RunLock(tmp_path)
    os.utime(lock_file(tmp_path), (1, 1))
    for _ in range(100):
        if lock_file(tmp_path).stat().st_mtime > 1:
            break
        time.sleep(0.05)
    assert lock_file(tmp_path).stat().st_mtime > 1
    lock.release()


OTHER = {"machine": "another", "host": "far", "pid": 1, "token": "other"}


def test_a_run_that_lost_its_lock_renews_no_other_and_ends(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(locks, "RENEWED_S", 0.05)
    lost = r"was taken over by another run \(process 1 on far\).*--output_dir"
    with locks.only_run(tmp_path, is_first=True):
        locks.check_held(tmp_path)
        # As another machine does while this one is suspended.
        lock_file(tmp_path).unlink()
        lock_file(tmp_path).write_text(json.dumps(OTHER))
        os.utime(lock_file(tmp_path), (1, 1))
        with pytest.raises(UserError, match=lost):
            locks.check_held(tmp_path)
        time.sleep(0.5)
        assert lock_file(tmp_path).stat().st_mtime == 1
    assert "was taken over by another run" in caplog.text
    assert json.loads(lock_file(tmp_path).read_text()) == OTHER
    lock_file(tmp_path).unlink()  # the other one has ended
    with pytest.raises(UserError, match=r"is gone.*--output_dir"):
        locks.check_held(tmp_path)


def test_a_lock_that_cannot_be_read_for_a_moment_is_not_lost(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(5, "Input/output error")

    with locks.only_run(tmp_path, is_first=True):
        with monkeypatch.context() as patch:
            patch.setattr(type(tmp_path), "read_text", fail)
            locks.check_held(tmp_path)
        lock_file(tmp_path).write_text("")
        locks.check_held(tmp_path)


def test_a_writer_that_lost_its_lock_leaves_alone_what_the_other_writes(tmp_path):
    def write_slowly():
        with locks.only_writer(tmp_path / "a", "--to") as path:
            lock_file(path.parent).unlink()
            lock_file(path.parent).write_text(json.dumps(OTHER))
            path.write_text("the other's")

    with pytest.raises(UserError, match=r"was taken over by another run.*--to"):
        write_slowly()
    assert not (tmp_path / "a").exists()
    assert (tmp_path / ".a.unfinished" / "a").read_text() == "the other's"


@pytest.mark.parametrize(
    ("content", "named"), [(json.dumps(OTHER), r"\(process 1 on far\)"), ("", r"\(its \.lock does not say which\)")]
)
def test_a_lock_that_is_only_just_made_is_told_of_by_what_it_says_then(tmp_path, monkeypatch, content, named):
    monkeypatch.setattr(locks, "LOOKS_S", 0.1)
    lock_file(tmp_path).touch()

    def go_on():
        for _ in range(10):
            time.sleep(0.15)
            lock_file(tmp_path).write_text(content)

    other = threading.Thread(target=go_on)
    other.start()
    with pytest.raises(UserError, match=f"in use by another run {named}"):
        locks.RunLock(tmp_path)
    other.join()


def test_one_builder_waits_for_another_and_not_for_one_that_was_killed(tmp_path, caplog):
    code = "import sys, time; from pathlib import Path; from rasengan.locks import only_builder\n"
    code += "with only_builder(Path(sys.argv[1])): print('building', flush=True); time.sleep(float(sys.argv[2]))"
    caplog.set_level(logging.INFO)
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path, "0.5"], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "building\n"
    with locks.only_builder(tmp_path):
        assert process.wait(timeout=5) == 0
    assert "Another run builds" in caplog.text
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path, "60"], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "building\n"
    process.kill()
    process.wait()
    with locks.only_builder(tmp_path):
        pass


def write_in_another_process(place, seconds):
    """Begin to write a place, and return the process."""
    code = "import sys, time; from pathlib import Path; from rasengan.locks import only_writer\n"
    code += (
        "with only_writer(Path(sys.argv[1]), '--to') as path: path.write_text('other'); print('begun', flush=True); "
    )
    code += "time.sleep(float(sys.argv[2]))"
    command = [sys.executable, "-c", code, place, str(seconds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "begun\n"
    return process


def write(place):
    with locks.only_writer(place, "--to") as path:
        assert not path.exists()
        assert not place.exists()
        path.write_text("mine")


def test_of_two_that_write_a_place_one_does_and_the_other_is_refused(tmp_path):
    place = tmp_path / "new" / "a.b"
    process = write_in_another_process(place, 1)
    with pytest.raises(UserError, match=r"in use by another run \(process .*, or give another --to\."):
        write(place)
    assert process.wait(timeout=10) == 0
    assert place.read_text() == "other"
    with pytest.raises(UserError, match=r"--to .*a\.b exists\. Give a name that does not\."):
        write(place)
    assert place.read_text() == "other"
    assert list(place.parent.iterdir()) == [place]


def test_what_a_killed_writer_left_is_removed_by_the_next_one(tmp_path):
    place = tmp_path / ".[a]"
    process = write_in_another_process(place, 60)
    process.kill()
    process.wait()
    assert not place.exists()
    assert list(tmp_path.iterdir()), "it could not clear up"
    write(place)
    assert place.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [place]


def test_a_writer_that_fails_leaves_nothing(tmp_path):
    def fail():
        with locks.only_writer(tmp_path / "new" / "a", "--to") as path:
            path.mkdir()
            (path / "part").touch()
            raise RuntimeError

    pytest.raises(RuntimeError, fail)
    assert list(tmp_path.iterdir()) == []


def test_a_signal_while_the_lock_is_taken_leaves_none(tmp_path, monkeypatch):
    def start(thread):
        raise stopping.Terminated

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(stopping.Terminated), locks.only_run(tmp_path / "run", is_first=True):
        pytest.fail("it is not taken")
    assert not (tmp_path / "run").exists()

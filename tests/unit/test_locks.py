import json
import logging
import os
import subprocess
import sys
import time

import pytest

from rasengan import UserError, locks


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
    owner = {"boot": locks._boot(), "host": "here", "pid": os.getpid(), "started": "1", "token": "x"}
    lock_file(tmp_path).write_text(json.dumps(owner))
    locks.RunLock(tmp_path).release()


@pytest.mark.parametrize("content", ['{"boot": "another", "host": "far", "pid": 1, "token": "x"}', "", "[]"])
def test_the_lock_of_another_machine_is_stale_by_its_age(content, tmp_path, monkeypatch):
    lock_file(tmp_path).write_text(content)
    with pytest.raises(UserError, match="in use by another run"):
        locks.RunLock(tmp_path)
    old = time.time() - locks.STALE_S - 1
    os.utime(lock_file(tmp_path), (old, old))
    # The clock of this machine has no say in it.
    monkeypatch.setattr(time, "time", lambda: 0.0)
    locks.RunLock(tmp_path).release()
    assert list(tmp_path.iterdir()) == []


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

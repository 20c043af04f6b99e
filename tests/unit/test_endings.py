import errno
import re
import shutil
import signal
import threading
import time

import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

from rasengan import UserError, endings, logs, stopping


def failing(error):
    def run(*_):
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("It is wrong. Mend it."), 2, "error: It is wrong. Mend it.\n"),
        (UserError(f"--rank is hf_{'a' * 30}. Mend it."), 2, "error: --rank is (a token). Mend it.\n"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "error: --here cannot be written or read: No space"),
        (torch.OutOfMemoryError(), 2, "error: The card's memory does not suffice."),
        (KeyboardInterrupt(), 130, "\nEnded by Ctrl-C."),
        (stopping.Terminated(), 143, "\nEnded by SIGTERM."),
    ],
)
def test_an_error_of_the_user_is_one_line_and_a_code(capsys, error, code, said):
    assert endings.in_one_line(failing(error), "--here") == code
    assert capsys.readouterr().err.startswith(said)


def test_one_of_several_processes_says_which_it_is_and_a_lost_place_what_comes_after_it(capsys):
    assert endings.in_one_line(failing(UserError("It is wrong.")), "--here", process=1) == 2
    assert capsys.readouterr().err == "error (process 1): It is wrong.\n"
    full = OSError(errno.ENOSPC, "No space left on device")
    assert endings.in_one_line(failing(full), "--here", once_mended="Then go on.") == 2
    assert capsys.readouterr().err.endswith("Make room, or mend it. Then go on.\n")


def test_training_ends_so_too_where_the_cards_memory_does_not_suffice_for_what_comes_before_its_steps(
    train_script, monkeypatch, capsys
):
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(train_script, "main", failing(torch.OutOfMemoryError("24 GiB, a hundred words")))
    monkeypatch.setattr(train_script, "parse_args", lambda argv: None)
    assert train_script.run([]) == 2
    assert re.fullmatch(r"error: The card's memory does not suffice\. .*\n", capsys.readouterr().err)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("error", [ValueError("ours"), OSError(errno.EBADF, "Bad file descriptor")])
def test_an_error_of_ours_stays_one(error):
    with pytest.raises(type(error)):
        endings.in_one_line(failing(error), "--here")


def test_half_a_character_in_an_error_is_written_out(capsys):
    assert endings.in_one_line(failing(UserError("the class '\ud800' is unknown")), "--here") == 2
    assert capsys.readouterr().err == "error: the class '\\ud800' is unknown\n"


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (1, 1)])
def test_a_code_is_handed_on(returned, code):
    assert endings.in_one_line(lambda: returned, "--here") == code


def log_on(writer):
    for step in range(200):
        writer.add_scalar("loss", 1.0, step)
        time.sleep(0.05)


def test_a_tracker_whose_folder_vanished_raises_and_prints_nothing(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(threading, "excepthook", shown.append)
    logs.hush_writers(tmp_path / "logs")
    writer = SummaryWriter(tmp_path / "logs", max_queue=1, flush_secs=1)
    shutil.rmtree(tmp_path / "logs")
    with pytest.raises(FileNotFoundError):  # by the next scalar after its thread has seen it
        log_on(writer)
    assert shown == []
    other = threading.Thread(target=failing(OSError("of another thread")))
    other.start()
    other.join()
    assert [str(end.exc_value) for end in shown] == ["of another thread"]


def test_a_full_disk_under_a_tracker_is_named_with_what_it_takes_and_what_is_free(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    logs.hush_writers(tmp_path / "logs")
    writer = SummaryWriter(tmp_path / "logs", max_queue=1, flush_secs=1)
    (file,) = (tmp_path / "logs").iterdir()
    file.unlink()
    file.symlink_to("/dev/full")
    assert endings.in_one_line(lambda: log_on(writer), "--here") == 2
    said = capsys.readouterr().err
    assert said.startswith(
        f"error: {tmp_path / 'logs'} cannot be written or read: No space left on device. It takes 1.0 "
    )
    assert " MiB are free there. Make room, or mend it." in said

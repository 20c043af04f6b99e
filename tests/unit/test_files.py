import errno
import os
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from safetensors import SafetensorError

from rasengan import UserError, files
from rasengan.files import (
    MOST_NAME_BYTES,
    check_name,
    check_writable,
    give_default_mode,
    lost_place,
    remove_left_behind,
    room,
    write_atomically,
    write_failure,
    write_if_free,
)


ROOT = Path(__file__).parents[2]


def test_a_file_appears_whole_in_a_folder_that_is_made_for_it(tmp_path):
    write_atomically(tmp_path / "a" / "b" / "file.json", b"content")
    assert (tmp_path / "a" / "b" / "file.json").read_bytes() == b"content"
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["file.json"]


def test_a_file_is_replaced_and_its_old_content_stays_whole_for_who_has_it_open(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with open(path, "rb") as reader:
        write_atomically(path, b"new, and longer")
        assert reader.read() == b"old"
    assert path.read_bytes() == b"new, and longer"


def test_a_write_that_fails_names_the_file_and_not_its_temporary_name(tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError) as error:
        write_atomically(tmp_path / "folder", b"content")
    assert lost_place(error.value, "--output_dir") == (
        f"{tmp_path / 'folder'} cannot be written or read: Is a directory. Make room, or mend it."
    )

    def write_bytes(*_):
        raise OSError(errno.ENOSPC, "No space left on device")  # as the kernel says it of an open file

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    with pytest.raises(OSError) as error:
        write_atomically(tmp_path / "file", b"content")
    said = lost_place(error.value, "--output_dir")
    assert said.startswith(
        f"{tmp_path / 'file'} cannot be written or read: No space left on device. It takes 0.0 KiB, and "
    )
    assert said.endswith("iB are free there. Make room, or mend it.")


def test_a_full_disk_without_a_size_says_what_is_free_and_one_without_inodes_that(tmp_path, monkeypatch):
    said = lost_place(OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "not" / "there")), "x")
    assert re.search(
        r"not/there cannot be .* device\. It takes 4\.0 KiB at least, and [\d.,]+ MiB are free there\. Make room", said
    )
    found = list(os.statvfs(tmp_path))
    found[7] = 0  # of the files that a user may make
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result(found))
    assert room(tmp_path, 5).endswith(" MiB are free there, but no further files can be made")


def test_of_a_full_folder_its_own_disk_counts_which_may_be_mounted_there(tmp_path, monkeypatch):
    (tmp_path / "logs").mkdir()
    asked = []
    monkeypatch.setattr(files, "room", lambda folder, needed_bytes: asked.append(folder) or "no room")
    for name in ("logs", "file"):
        assert "no room." in lost_place(OSError(errno.ENOSPC, "full", str(tmp_path / name)), "x")
    assert asked == [tmp_path / "logs", tmp_path]


def test_a_dead_mount_is_no_error_of_its_own(tmp_path, monkeypatch):
    def stat(*_, **__):
        raise OSError(errno.ENOTCONN, "Transport endpoint is not connected")

    monkeypatch.setattr(os, "stat", stat)
    assert room(tmp_path, 2048) == f"It takes 2.0 KiB, and {tmp_path} cannot be looked at"


def test_what_a_library_of_rust_says_of_a_disk_is_known():
    assert write_failure(Exception("No space left on device (os error 28)")) == "No space left on device (os error 28)"
    assert write_failure(OSError(errno.EFBIG, "File too large")) == "File too large"
    assert write_failure(SafetensorError("I/O error.")) == "I/O error"
    assert write_failure(ValueError("of ours")) is None


@pytest.mark.parametrize("number", ["EACCES", "EPERM", "EEXIST", "EISDIR", "ENOTDIR", "ENOENT"])
def test_a_name_that_cannot_be_used_is_the_users_matter_where_it_is_known(number):
    number = getattr(errno, number)
    assert (
        lost_place(OSError(number, "no", "logs"), "x") == "logs cannot be written or read: no. Make room, or mend it."
    )
    assert lost_place(OSError(number, "no"), "x") is None


@pytest.mark.parametrize("before", [None, b"old"])
def test_a_write_that_fails_on_the_way_leaves_what_was_there(tmp_path, before):
    path = tmp_path / "file"
    if before is not None:
        path.write_bytes(before)
    with pytest.raises(TypeError):
        write_atomically(path, "no bytes: the temporary file is open when this fails")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == ({"file": before} if before else {})


def test_a_rename_that_fails_leaves_no_temporary_file(tmp_path):
    (tmp_path / "file").mkdir()  # nothing can be renamed onto a folder
    with pytest.raises(OSError, match="directory"):
        write_atomically(tmp_path / "file", b"content")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").is_dir()


def test_a_write_that_stops_half_way_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    # A limit on the size of files stops the write after its first bytes, as a full disk does.
    code = (
        "import pathlib, resource, sys; from rasengan.files import write_atomically;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000));"
        "write_atomically(pathlib.Path(sys.argv[1]), bytes(5000))"
    )
    finished = subprocess.run([sys.executable, "-c", code, path], cwd=ROOT, capture_output=True, text=True)
    assert "OSError: [Errno 27]" in finished.stderr
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"file": b"old"}


def test_a_reader_never_sees_half_a_file(tmp_path):
    path, contents = tmp_path / "file", [bytes(1 << 20), b"1" * (1 << 20)]
    write_atomically(path, contents[0])
    seen, done = [], threading.Event()

    def read():
        while not done.is_set():
            seen.append(path.read_bytes())

    reader = threading.Thread(target=read)
    reader.start()
    for turn in range(30):
        write_atomically(path, contents[turn % 2])
    done.set()
    reader.join()
    assert len(seen) > 10
    assert all(content in contents for content in seen)


def test_a_file_system_without_modes_is_written_to(tmp_path, monkeypatch):
    def chmod(*_, **__):
        raise PermissionError(errno.EPERM, "Operation not permitted")  # as vfat and CIFS do

    monkeypatch.setattr(os, "chmod", chmod)
    (tmp_path / "file").touch()
    give_default_mode(tmp_path / "file")


def test_a_folder_that_can_be_written_is_left_as_it_was(tmp_path):
    (tmp_path / "there").mkdir()
    check_writable(tmp_path / "a" / "b", "--output_dir")
    check_writable(tmp_path / "there", "--output_dir")
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]


def test_processes_that_check_the_same_new_folder_at_once_do_not_disturb_each_other(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda turn: check_writable(tmp_path / str(turn // 8) / "run", "--output_dir"), range(800)))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_refused_by_its_flag(tmp_path):
    (tmp_path / "file").write_bytes(b"no folder")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=f"^--output_dir {folder} cannot be written: .*Give another"):
            check_writable(folder, "--output_dir")


@pytest.mark.parametrize("parent", [".", "new"])
def test_a_name_that_is_too_long_is_refused_and_leaves_nothing_behind(tmp_path, parent):
    with pytest.raises(UserError, match="^--output_dir .* cannot be written: File name too long.*Give another"):
        check_writable(tmp_path / parent / ("x" * 300), "--output_dir")
    assert list(tmp_path.iterdir()) == []


def test_a_name_leaves_room_for_that_of_an_unfinished_file(tmp_path):
    write_atomically(tmp_path / ("x" * MOST_NAME_BYTES), b"content")
    check_name(tmp_path / ("x" * MOST_NAME_BYTES), "--save_merged")
    with pytest.raises(UserError, match=r"^--save_merged: the name ナ+ has 201 bytes. Give one of 200 at most"):
        check_name(tmp_path / ("ナ" * 67), "--save_merged")


def test_a_check_whether_a_folder_can_be_written_survives_a_clearing_of_it(tmp_path):
    ended = threading.Event()

    def clear():  # as the run's first process does, at any time
        while not ended.is_set():
            remove_left_behind(tmp_path)

    thread = threading.Thread(target=clear)
    thread.start()
    try:
        for _ in range(300):
            check_writable(tmp_path, "--output_dir")
    finally:
        ended.set()
        thread.join()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("has_links", [True, False])
def test_a_name_that_another_took_is_not_written_over(has_links, tmp_path, monkeypatch):
    def no_link(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    if not has_links:  # as on FAT
        monkeypatch.setattr(os, "link", no_link)
    file = tmp_path / "a" / "file"
    assert write_if_free(file, b"first")
    assert not write_if_free(file, b"second")
    assert [(path, path.read_bytes()) for path in file.parent.iterdir()] == [(file, b"first")]


def test_a_name_that_is_too_long_is_told_of():
    try:
        os.stat("a" * 300)
    except OSError as error:
        said = files.lost_place(error, "--input")
    assert said.endswith("cannot be written or read: File name too long. Give a shorter name.")

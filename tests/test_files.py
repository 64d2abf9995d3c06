import fcntl
import os

import pytest

from easy_diffusion.files import atomic_path, write_atomically


def test_a_file_is_written_and_replaced_and_its_folder_is_created(tmp_path):
    path = tmp_path / "new" / "log.csv"
    for content in (b"first", b"second"):
        write_atomically(path, content)
        assert path.read_bytes() == content
        assert list(path.parent.iterdir()) == [path]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "log.csv"
    write_atomically(path, b"first")
    with pytest.raises(KeyboardInterrupt):
        with atomic_path(path) as temporary:
            temporary.write_bytes(b"sec")
            raise KeyboardInterrupt
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_left_is_removed_by_the_next_write(tmp_path):
    path = tmp_path / "log.csv"
    (tmp_path / "log.csv.writing").mkdir()
    (tmp_path / "log.csv.writing" / "log.csv").write_bytes(b"half of i")
    write_atomically(path, b"whole")
    assert path.read_bytes() == b"whole"
    assert list(tmp_path.iterdir()) == [path]


def test_the_file_is_flushed_before_it_is_renamed(tmp_path, monkeypatch):
    """`fsync` gets a handle that is open for writing; Windows refuses any other."""
    events = []
    replace = os.replace

    def record_fsync(handle):
        mode = fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE
        events.append("read-only fsync" if mode == os.O_RDONLY else "fsync")

    def record_replace(source, target):
        events.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    write_atomically(tmp_path / "log.csv", b"index,loss")
    assert events == ["fsync", "replace"]
    assert (tmp_path / "log.csv").read_bytes() == b"index,loss"

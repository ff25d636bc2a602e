"""A file is the old one or the new one, never a part, and nothing is left beside it."""

import errno
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from transformers_prism.whole_files import whole_file, write_json, write_text

pytestmark = pytest.mark.quick


def test_a_full_disk_leaves_the_file_that_was_there(tmp_path):
    path = tmp_path / "state.json"
    write_json(path, {"step": 1})

    def write_half():
        with whole_file(path) as unfinished:
            unfinished.write_text('{"step"')
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="No space left"):
        write_half()
    assert json.loads(path.read_text()) == {"step": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_new_file_takes_the_place_of_the_old_one(tmp_path):
    path = tmp_path / "state.json"
    for step in range(2):
        write_json(path, {"step": step})
        assert json.loads(path.read_text()) == {"step": step}
    with pytest.raises(TypeError):
        write_json(path, {"step": object()})
    assert json.loads(path.read_text()) == {"step": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_threads_write_the_same_file_beside_each_other(tmp_path):
    """Each in a file of its own until it is whole."""
    path = tmp_path / "state.json"
    barrier = threading.Barrier(8)

    def write(number: int) -> Path:
        with whole_file(path) as unfinished:
            unfinished.write_text(str(number))
            barrier.wait()
            assert unfinished.read_text() == str(number)
        return unfinished

    with ThreadPoolExecutor(8) as threads:
        assert len(set(threads.map(write, range(8)))) == 8
    assert list(tmp_path.iterdir()) == [path]


def test_a_pipe_is_written_to_and_stays(tmp_path):
    """As `--json /dev/stdout` is, which must not become a file."""
    path, read = tmp_path / "pipe", []
    os.mkfifo(path)
    reader = threading.Thread(target=lambda: read.append(path.read_text()))
    reader.start()
    write_text(path, "figures")
    reader.join(10)
    assert read == ["figures"]
    assert path.is_fifo()

"""Files are complete or absent, whatever happens to their writers."""

import os
import signal
import time
import uuid

import pytest

from finetune.files import replacing
from tests.support import script

HOUR = 3600


def test_an_interrupted_write_leaves_the_old_file_and_no_temporary_one(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with replacing(path) as temporary:
        assert temporary.parent == tmp_path  # a rename is atomic only within a file system
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_a_block_that_writes_nothing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "a.json"):
        pass
    assert not list(tmp_path.iterdir())


def test_several_writers_of_one_file_do_not_mix(tmp_path):
    path = tmp_path / f"{'é' * 120}.json"  # 245 bytes; a name has at most 255
    with replacing(path) as first:
        first.write_text("first")
        with replacing(path) as second:
            second.write_text("second")
            assert first.read_text() == "first"
        assert path.read_text() == "second"
        with pytest.raises(KeyError), replacing(path) as third:
            third.write_text("thi")
            raise KeyError
    assert path.read_text() == "first" and list(tmp_path.iterdir()) == [path]


def test_temporary_files_of_killed_writers_are_removed_after_a_day(tmp_path):
    code = "import os, sys; from pathlib import Path; from finetune.files import replacing\n"
    code += "with replacing(Path(sys.argv[1])) as file: file.write_text('half'); os.kill(os.getpid(), 9)"
    for name in ("old", "new"):
        assert script("-c", code, tmp_path / f"{name}.json", timeout=60, check=False).returncode == -signal.SIGKILL
    (old,), (new,) = tmp_path.glob(".old.json.*.tmp"), tmp_path.glob(".new.json.*.tmp")
    mine = tmp_path / ".mine.tmp"  # of another program
    mine.touch()
    now = time.time()
    for path, hours in ((old, 24.1), (new, 23.9), (mine, 25)):
        os.utime(path, (now - hours * HOUR, now - hours * HOUR))
    with replacing(tmp_path / "a.json") as temporary:
        temporary.touch()
    assert set(tmp_path.iterdir()) == {mine, new, tmp_path / "a.json"}


def test_a_folder_is_searched_for_temporary_files_once(tmp_path):
    """A listing costs as much as a write."""
    stale = tmp_path / f".b.json.{uuid.uuid4().hex}.tmp"
    with replacing(tmp_path / "a.json") as temporary:
        temporary.touch()
    stale.touch()
    os.utime(stale, (0, 0))
    with replacing(tmp_path / "b.json") as temporary:
        temporary.touch()
    assert stale.exists()

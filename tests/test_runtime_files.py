"""Files appear whole or not at all; one process at a time holds a folder."""

import errno
import fcntl
import multiprocessing
import os
import threading

import pytest

from cgd_jax.runtime import files, locks


def test_a_file_is_replaced_when_the_block_ends(tmp_path):
    path = tmp_path / "vectors.npz"
    path.write_text("old")
    with files.replacing(path) as part:
        assert part.parent == tmp_path and part.suffix == ".npz"
        part.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    with pytest.raises(KeyError), files.replacing(path) as part:
        part.write_text("half")
        raise KeyError
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_two_writers_of_one_file_do_not_mix(tmp_path):
    path = tmp_path / "a.json"
    with files.replacing(path) as one, files.replacing(path) as two:
        one.write_text("one")
        two.write_text("two")
    assert path.read_text() == "one"  # the block that ended last


def test_a_name_of_255_bytes_can_be_written(tmp_path):
    path = tmp_path / ("ü" * 125 + ".json")
    files.write_json(path, {"a": 1})
    assert '"a": 1' in path.read_text()


def hold_and_die(path, held, die):
    with locks.one_at_a_time(path):
        held.set()
        die.wait(60)
        os._exit(9)


def test_a_lock_ends_with_its_holder(tmp_path):
    path, spawn = tmp_path / "lock", multiprocessing.get_context("spawn")
    held, die = spawn.Event(), spawn.Event()
    process = spawn.Process(target=hold_and_die, args=(path, held, die))
    process.start()
    assert held.wait(60)
    with pytest.raises(BlockingIOError), locks.one_at_a_time(path, wait=False):
        pytest.fail("two at a time")
    entered = threading.Event()

    def wait():
        with locks.one_at_a_time(path) as alone:
            assert alone
            entered.set()

    thread = threading.Thread(target=wait)
    thread.start()
    assert not entered.wait(0.3)
    die.set()
    process.join()
    assert process.exitcode == 9 and entered.wait(10)
    thread.join()


@pytest.mark.parametrize("error", [errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP])
def test_a_file_system_without_locks_lets_everybody_in(tmp_path, monkeypatch, error):
    def refuse(*_):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locks.one_at_a_time(tmp_path / "lock") as one:
        with locks.one_at_a_time(tmp_path / "lock", wait=False) as two:
            assert not one and not two


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError), locks.one_at_a_time(tmp_path / "file" / "lock"):
        pytest.fail("there is no such folder")


def test_the_holder_of_a_work_folder_is_named(tmp_path):
    with locks.one_run_in(tmp_path):
        for _ in range(2):  # asking does not erase the answer
            with pytest.raises(BlockingIOError, match=rf"process {os.getpid()} on "):
                with locks.one_run_in(tmp_path):
                    pytest.fail("two runs in one folder")

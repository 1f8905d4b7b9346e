"""A file that one process at a time writes: who holds it, and what ends that."""

import errno
import fcntl
import os

import pytest

from qzo.system import lock


@pytest.fixture
def two(tmp_path):
    """Two open files of one path."""
    with open(tmp_path / "x", "wb") as first, open(tmp_path / "x", "rb") as second:
        yield first, second


def test_the_second_is_refused_until_the_first_is_closed(two):
    first, second = two
    assert lock.take(first.fileno())
    assert not lock.take(second.fileno())
    assert lock.holder(second.fileno()) == f"process {os.getpid()}, this one"
    first.close()
    assert lock.take(second.fileno())


def test_a_process_that_was_killed_holds_nothing(two):
    first, second = two
    first.close()
    ready, told = os.pipe()
    child = os.fork()
    if not child:
        third = os.open(second.name, os.O_RDWR)
        os.write(told, b"y" if lock.take(third) else b"n")
        os.read(os.pipe()[0], 1)  # for ever
    assert os.read(ready, 1) == b"y"
    assert not lock.take(second.fileno())
    assert lock.holder(second.fileno()) == f"process {child}"
    os.kill(child, 9)
    os.waitpid(child, 0)
    assert lock.take(second.fileno())


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_goes_without(two, monkeypatch, code):
    def none(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", none)
    assert lock.take(two[0].fileno())


def test_another_error_is_none_of_that(two, monkeypatch):
    def broken(*_):
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    monkeypatch.setattr(fcntl, "flock", broken)
    with pytest.raises(OSError, match="Bad file descriptor"):
        lock.take(two[0].fileno())


def test_a_holder_that_the_system_does_not_tell(two, monkeypatch, tmp_path):
    assert lock.holder(two[0].fileno()) == "another process", "nobody has it"
    lock.take(two[0].fileno())
    monkeypatch.setattr(lock, "LOCKS", tmp_path / "none")
    assert lock.holder(two[0].fileno()) == "another process"

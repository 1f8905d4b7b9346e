"""One process at a time writes a file: an advisory lock (flock) that ends with the process, whatever ends it."""

import errno
import fcntl
import os
import re
from pathlib import Path

LOCKS = Path("/proc/locks")
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)  # file systems without


def take(handle: int) -> bool:
    """Lock an open file until it is closed; False where another open file holds the lock, in whatever process.

    True, without a lock, on a file system that has none. A child that is forked shares the lock of its parent.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True


def holder(handle: int) -> str:
    """Who has locked the file that `handle` is open on: "process 123", or "another process" if the system does not
    tell (the other is on another machine, or in another container)."""
    inode = os.fstat(handle).st_ino
    try:
        table = LOCKS.read_text()
    except OSError:
        table = ""
    found = re.search(rf"FLOCK +\w+ +WRITE +([1-9]\d*) +\w+:\w+:{inode} ", table)
    if found is None:
        return "another process"
    return f"process {found[1]}" + (", this one" if int(found[1]) == os.getpid() else "")

"""A full disk, whoever reports it, and a path that cannot be used: it is named; and files
written whole or not at all."""

import contextlib
import errno
import os
import re
from pathlib import Path
from types import TracebackType

_UNUSABLE = {
    errno.EACCES: "permission denied; give another path, or change its owner",
    errno.EPERM: "permission denied; give another path, or change its owner",
    errno.EROFS: "its file system is read-only; give another path",
    errno.EEXIST: "it exists and is not a folder; give another path",
    errno.ENOTDIR: "a part of this path is a file, no folder; give another path",
    errno.ENOENT: "there is no such file or folder; give another path",
    errno.EISDIR: "it is a folder, expected a file",
    errno.ENAMETOOLONG: "a name in this path is too long; give a shorter one",
    errno.ELOOP: "it is a loop of symbolic links; give another path",
}
WHAT = {
    errno.ENOSPC: "no space left on the disk",
    errno.EDQUOT: "disk quota exceeded",
    errno.EFBIG: "a file would be larger than the file system or a limit (ulimit -f) allows",
}


def full(error: BaseException) -> int | None:
    """The errno of a full disk or an exhausted quota, else None.

    safetensors and tokenizers write in Rust, and tell it in their own exceptions' text.
    """
    found = error.errno if isinstance(error, OSError) else None
    told = re.search(r"\(os error (\d+)\)", str(error))
    found = int(told[1]) if found is None and told else found
    return found if found in WHAT else None


def unusable(error: BaseException) -> str | None:
    """One line for an OSError of a path that was given and cannot be used, else None."""
    if not isinstance(error, OSError) or error.filename is None or error.errno not in _UNUSABLE:
        return None
    return f"{error.filename2 or error.filename}: {_UNUSABLE[error.errno]}"


def line_of(error: BaseException) -> str:
    """What is said of an error: one line that can be shown. Names in it may come from a file, with codes that a
    terminal obeys."""
    text = unusable(error) or " ".join(str(error).split())
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


class naming(contextlib.AbstractContextManager):
    """Inside, an OSError that names no path, and a full disk in whatever exception, become an OSError of `path`.

    A full disk elsewhere keeps its own; one of a file in `path`, such as a temporary one, has that of the whole.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = str(path)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        code = None if error is None else full(error)
        if code is not None:
            own = str(getattr(error, "filename2", None) or getattr(error, "filename", None) or self.path)
            raise OSError(code, os.strerror(code), self.path if own.startswith(self.path) else own) from None
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            raise OSError(error.errno, error.strerror, self.path) from None


def write_whole(path: Path, data: bytes) -> None:
    """Write a file whole or not at all: into a temporary one beside it, which is on the disk before it is renamed; the
    new name is on the disk when this returns."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: str | os.PathLike[str]) -> None:
    """Wait until a file's content, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

"""A full disk, whoever reports it, and a path that cannot be used: it is named, and what is true of the command."""
import contextlib
import errno
import os
import re
from pathlib import Path

from .journal import JournalError, read

_UNUSABLE = {
    errno.EACCES: "permission denied; give another path, or change whose it is",
    errno.EPERM: "permission denied; give another path, or change whose it is",
    errno.EROFS: "its file system is read-only; give another path",
    errno.EEXIST: "it is there already and is no folder; give another path",
    errno.ENOTDIR: "a part of this path is a file, no folder; give another path",
    errno.EISDIR: "it is a folder, and a file is wanted",
    errno.ENAMETOOLONG: "a name in this path is too long; give a shorter one",
    errno.ELOOP: "its links lead round in a circle; give another path"}
_WHAT = {errno.ENOSPC: "no space left on the disk", errno.EDQUOT: "disk quota exceeded"}


def full(error):
    """The errno of a full disk or an exhausted quota, else None.

    safetensors and tokenizers write in Rust, and tell it in their own exceptions' text.
    """
    found = error.errno if isinstance(error, OSError) else None
    told = re.search(r"\(os error (\d+)\)", str(error))
    found = int(told[1]) if found is None and told else found
    return found if found in _WHAT else None


def unusable(error):
    """One line for an OSError of a path that was given and cannot be used, else None."""
    reason = _UNUSABLE.get(error.errno) if isinstance(error, OSError) and error.filename is not None else None
    return reason and f"{error.filename2 or error.filename}: {reason}"


class naming(contextlib.AbstractContextManager):
    """Inside, an OSError that names no path, and a full disk in whatever exception, become an OSError of `path`.

    A full disk elsewhere keeps its own; one of a file in `path`, such as a temporary one, has that of the whole.
    """

    def __init__(self, path):
        self.path = str(path)

    def __exit__(self, kind, error, trace):
        code = None if error is None else full(error)
        if code is not None:
            own = str(getattr(error, "filename2", None) or getattr(error, "filename", None) or self.path)
            raise OSError(code, os.strerror(code), self.path if own.startswith(self.path) else own) from None
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            raise OSError(error.errno, error.strerror, self.path) from None


def explain(error, command, out):
    """One line for a full disk: where, and what to do after this command. out: its --output-dir, or None."""
    where = error.filename or out
    text = _WHAT[full(error)] + (f" ({where})" if where else "")
    if command not in ("train", "demo"):
        kept = "; nothing was changed there: free space, or name an --output-dir elsewhere" if out else ": free space"
        return f"{text}{kept}, and run it again"
    steps = _saved(Path(out) / "journal.qzo") if out else None
    if steps is None:
        return f"{text}; no step is saved yet: free space, or name another --output-dir, and start again"
    saved = {0: "no step is saved yet", 1: "1 step is saved"}.get(steps, f"{steps} steps are saved")
    return f"{text}; {saved}: free space, then the same command with --output-dir {out} --resume"


def _saved(journal):
    """Whole steps of a journal, None where there is none that a run would go on with."""
    try:
        found = read(journal)
    except (OSError, JournalError):
        return None
    return None if found is None else len(found[1])

"""Where a command writes: checked before anything is loaded, so that nothing of the user's is overwritten."""

import itertools
import os
from pathlib import Path

from ..optim.journal import check_free, read

JOURNAL = "journal.qzo"
NAMED = 4  # files that a message names


def check_folder(
    folder: str | Path, overwrite: bool | None, source: str | Path | None = None, option: str = "--output-dir"
) -> None:
    """FileExistsError where a folder holds anything and `overwrite` is not set; NotADirectoryError or PermissionError
    where no folder can be; ValueError where it is the `source`, a checkpoint's folder."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{option} {folder} is a file; name a folder")
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"{option} {folder}: a part of this path is a file ({there}); give another path")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(
            f"{option} {folder}: {there} cannot be written to; give another path, or change its owner"
        )
    held = sorted(path.name for path in itertools.islice(folder.iterdir(), 1000)) if folder.is_dir() else []
    if held and not overwrite:
        names = ", ".join(held[:NAMED]) + (f" and {len(held) - NAMED} more" if len(held) > NAMED else "")
        raise FileExistsError(
            f"{option} {folder} holds {names} already, and existing files are not overwritten; name another folder, or "
            "add --overwrite to replace files of the same names"
        )
    check_apart(folder, source, option)


def check_apart(folder: str | Path, source: str | Path | None, option: str = "--output-dir") -> None:
    """ValueError where it is the folder, or the file, of the checkpoint `source`, which is never overwritten."""
    if source is not None and Path(folder).exists() and Path(source).exists() and Path(folder).samefile(source):
        raise ValueError(f"{option} {folder} is where the model is; the source is never overwritten, give another path")


def check_file(path: str | Path, overwrite: bool | None, option: str) -> None:
    """The same for one file. FileNotFoundError where its folder is not there."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{option} {path} is a folder; name a file")
    if not path.parent.exists():
        raise FileNotFoundError(f"{option} {path}: there is no folder {path.parent}; make it first")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{option} {path} exists already; name another file, or add --overwrite to replace it")


def check_run(
    folder: str | Path, resume: bool | None, overwrite: bool | None, source: str | Path | None = None
) -> None:
    """The same for a run's folder, which goes on with the journal in it or begins one.

    A journal is never overwritten: it may hold hours of work. ValueError for `resume` where there is none, or where
    another process goes on with it, and for a `source` that the tuned model would replace.
    """
    check_apart(Path(folder) / "model", source)
    journal = Path(folder) / JOURNAL
    if resume:
        if not journal.exists():
            raise ValueError(f"--resume: there is no {journal} to go on with; leave --resume out to begin a run")
        return check_free(journal)
    if journal.exists():
        found = read(journal)
        count = 0 if found is None else len(found[1])
        steps = "1 step" if count == 1 else f"{count} steps"
        raise FileExistsError(
            f"--output-dir {folder} holds a journal of {steps} already; continue it with --resume, name another "
            "folder, or delete the journal"
        )
    check_folder(folder, overwrite)

"""Writing files so that neither a crash nor a full disk leaves half of one."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ...system.as_json import parsed
from ...system.disk import naming, sync


@contextlib.contextmanager
def staged(folder: str | Path) -> Iterator[Path]:
    """Yield an empty folder to write into; its files move to `folder` when the block ends without an error.

    They are synced to disk first and then renamed one by one, so every name in `folder` holds a whole file at any
    time, old or new. An old config.json goes first and the new one comes last: a folder that holds one is of one model.
    Files of other names are left alone. On an error `folder` is as before; an OSError that names no path, or a full
    disk, names it.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give a folder to write the checkpoint into")
    made = [p for p in (folder, *folder.parents) if not p.exists()]
    with naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".qzo-", dir=folder))
        try:
            yield staging
            files = [path for path in staging.rglob("*") if path.is_file()]
            files.sort(key=lambda path: (path.name == "config.json", path))
            for file in files:
                sync(file)
            if (staging / "config.json").exists() and len(files) > 1:
                (folder / "config.json").unlink(missing_ok=True)
                sync(folder)
            for file in files:
                target = folder / file.relative_to(staging)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(file, target)
                sync(target.parent)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
            for path in made:
                with contextlib.suppress(OSError):  # it holds the result, or was never made
                    path.rmdir()


def copy(source: str | Path, target: str | Path) -> None:
    """Copy bytes, not permissions: a read-only source gives a writable copy."""
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def read_object(path: Path) -> dict[str, Any]:
    """The dictionary that a JSON file holds. ValueError for a file that holds none."""
    try:
        content = parsed(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a JSON {type(content).__name__}, not an object; fetch it again")
    return content


def patch(path: str | Path, chunks: Iterable[tuple[int, bytes]]) -> None:
    """Overwrite (offset, bytes) chunks of an existing file in place."""
    with open(path, "r+b") as file:
        for offset, data in chunks:
            file.seek(offset)
            file.write(data)

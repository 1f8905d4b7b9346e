"""Pictures with captions, from where people keep them, one in memory at a time.

a folder            pictures, each with a text file of its name beside it (cat.png, cat.txt), or a metadata.jsonl
                    of lines {"file_name", "text"}; "caption" and "prompt" are read as "text"
a folder of splits  such folders called train and valid (or validation, val, dev)
a dataset           a folder that save_to_disk of Hugging Face's datasets has written, or Parquet files as on its
                    Hub, with a column of pictures and one of text
"""

import io
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from ..system.as_json import parsed
from ..training import tables
from ..training.records import SPLITS

METADATA = "metadata.jsonl"
CAPTIONS = ("text", "caption", "prompt")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")  # and no other that Pillow knows: one of them calls Ghostscript
MOST_PIXELS = 1 << 26  # of a picture: unpacked it takes 4 bytes for each, and a file of some KB may say any number
# what Pillow raises for a damaged file, tags in it among them
_NO_PICTURE = (OSError, SyntaxError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, struct.error)
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_WANTED = (
    f"give each picture a text file of its name (cat.png, cat.txt), or a {METADATA} with lines "
    '{"file_name": "cat.png", "text": "a cat"}'
)


class Picture(NamedTuple):
    """A picture as it is stored; place: what messages call it."""

    place: str
    caption: str
    data: bytes


def splits_of(source: str | Path) -> dict[str, Path]:
    """split (train, valid) -> where `read_pictures` finds it. FileNotFoundError where there is nothing."""
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"no data at {path}: give a folder of pictures with captions")
    if (path / tables.SPLIT_NAMES).is_file():
        folders = [path / name for name in tables.dataset_splits(path)]
    else:
        folders = [folder for folder in sorted(path.iterdir()) if folder.is_dir()] if path.is_dir() else []
    known = {name: split for split, names in SPLITS.items() for name in names}
    found = {known[folder.name]: folder for folder in folders if folder.name in known}
    parts = {split: path for split in SPLITS if path.is_dir() and _parquet(path, split)}
    return parts or (found if "train" in found else {"train": path})


def read_pictures(path: Path, split: str = "train") -> Iterator[Picture]:
    """The pictures at a place that `splits_of` gave for a split, in a fixed order.

    Raises ValueError for pictures without captions, a metadata file that cannot be read or names what is not there, and
    for no pictures.
    """
    if path.is_file() or _parquet(path, split) or (path / tables.DATASET).is_file():
        return _of_tables(path, split)
    return _of_folder(path)


def _parquet(path: Path, split: str) -> list[Path]:
    return [f for name in SPLITS[split] for at in (path, path / "data") for f in sorted(at.glob(f"{name}-*.parquet"))]


def _of_folder(folder: Path) -> Iterator[Picture]:
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in ENDINGS)
    if (folder / METADATA).is_file():
        captions = _metadata(folder)
    else:
        captions = {file: _text_of(text) for file in files if (text := file.with_suffix(".txt")).is_file()}
    if not files and not captions:
        raise ValueError(f"{folder} holds no pictures ({', '.join(ENDINGS)}); {_WANTED}")
    bare = [file for file in files if not captions.get(file, "").strip()]
    if bare:
        raise ValueError(
            f"{folder}: {len(bare)} of {len(files)} pictures have no caption, the first is "
            f"{bare[0].relative_to(folder)}; {_WANTED}"
        )
    for file in files:
        yield Picture(str(file.relative_to(folder)), captions[file].strip(), file.read_bytes())


def _text_of(file: Path) -> str:
    """A file of UTF-8."""
    try:
        return file.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 ({error}): save it as UTF-8") from None


def _metadata(folder: Path) -> dict[Path, str]:
    """file -> caption of the lines of metadata.jsonl."""
    found = {}
    for number, line in enumerate(_text_of(folder / METADATA).splitlines(), 1):
        where = f"{folder / METADATA}, line {number}"
        if not line.strip():
            continue
        try:
            record = parsed(line)
        except ValueError as error:
            raise ValueError(f"{where} is not JSON ({error})") from None
        name = record.get("file_name") if isinstance(record, dict) else None
        text = _caption(record) if isinstance(record, dict) else None
        if not isinstance(name, str) or text is None:
            raise ValueError(f'{where}: expected {{"file_name": "cat.png", "text": "a cat"}}, got {line:.80}')
        file = folder / name
        if not file.is_file() or not file.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{where} names {name!r:.100}, which is no file of {folder}")
        found[file] = text
    return found


def _caption(record: dict[str, Any]) -> str | None:
    return next((record[key] for key in CAPTIONS if isinstance(record.get(key), str)), None)


def _of_tables(path: Path, split: str) -> Iterator[Picture]:
    files = [path] if path.is_file() else _parquet(path, split) or tables.dataset_files(path)
    for file in files:
        for number, record in tables.rows(file, file.suffix):
            where = f"{file.name}, row {number}"
            cell = next((v for v in record.values() if isinstance(v, dict) and isinstance(v.get("bytes"), bytes)), None)
            text = _caption(record)
            if cell is None or not (text or "").strip():
                raise ValueError(
                    f"{where} of {path}: expected a picture (a column of datasets.Image, its bytes inside) and a "
                    f"caption ({', '.join(CAPTIONS)}), got the columns {', '.join(record) or 'none'}"
                )
            yield Picture(where, str(text).strip(), cell["bytes"])


def pixels(picture: Picture, resolution: int) -> torch.Tensor:
    """float32 [3, resolution, resolution] in [-1, 1]: upright, transparency on white, scaled to cover the square, its
    middle cut out.

    Raises ValueError for what is no picture, for one of more than MOST_PIXELS, and for one whose shorter edge is less
    than half the resolution.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            opened = Image.open(io.BytesIO(picture.data), formats=FORMATS)
        with opened:
            if opened.width * opened.height > MOST_PIXELS:
                raise ValueError(f"{opened.width} x {opened.height} are more than {MOST_PIXELS:,} pixels")
            image = ImageOps.exif_transpose(opened).convert("RGBA")
    except (*_NO_PICTURE, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ValueError(f"it cannot be read ({' '.join(str(error).split()):.80})") from None
    width, height = image.size
    if 2 * min(width, height) < resolution:
        raise ValueError(f"it is {width} x {height}, less than half of {resolution}")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    square = ImageOps.fit(image, (resolution, resolution), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 127.5 - 1

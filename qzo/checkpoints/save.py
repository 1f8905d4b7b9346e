"""Models that load.py read, back to disk: in the format they came from, or in another."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, overload

from .formats import TARGETS, files, gguf
from .formats.protocol import Copied
from .new_folder import check_free, own_target, write_new
from .rounding_cost import rounding_losses
from .source import Source, source_of
from .trained import Trained

_EXPORTS = (*TARGETS, gguf.METHOD)


@overload
def save_pretrained(model: Any, out_dir: str | Path, batch: None = None) -> None: ...
@overload
def save_pretrained(model: Any, out_dir: str | Path, batch: Mapping[str, Any]) -> dict[str, float]: ...
def save_pretrained(model: Any, out_dir: str | Path, batch: Mapping[str, Any] | None = None) -> dict[str, float] | None:
    """Save in the format the model came from: the source's files with new scales, all else byte for byte.

    A GGUF file keeps its name. A float source is saved as compressed-tensors (pack-quantized), or as bitsandbytes
    with NF4 or FP4 codes. Files of other names in out_dir are left alone.

    Parameters
    ----------
    model
        From `qzo.from_pretrained`.
    out_dir
        A folder; it is made where it is not there.
    batch
        As `qzo.losses` takes it: the cost of rounding the scales to the file's own dtype is measured on it.

    Returns
    -------
    dict or None
        {"loss_before", "loss_after"} of the batch, None without one.

    Raises
    ------
    ValueError, FileNotFoundError
        When the model does not come from `qzo.from_pretrained`, its source has changed or is gone, or out_dir is the
        source.
    """
    source = _checked_source(model)
    report = None if batch is None else rounding_losses(model, source, batch)
    if source.copied is None:
        write_new(model, source, Path(out_dir), own_target(model))
    else:
        _write_copy(model, source, source.copied, Path(out_dir), source.path.name)
    return report


def export(model: Any, out: str | Path, format: str = "compressed-tensors") -> None:  # noqa: A002
    """Save in another format; the new files hold the same weights, exactly, in another arrangement.

    Nothing is quantized again; scales are rounded to the dtype that the source has them in.

    Parameters
    ----------
    model
        From `qzo.from_pretrained`.
    out
        A folder, or a .gguf file for "gguf".
    format
        "awq", "bitsandbytes", "compressed-tensors", "gptq" or, from a GGUF source, "gguf".

    Raises
    ------
    ValueError
        Naming the layer and the reason where the format cannot hold it: a float minimum, an order of columns, bits,
        group sizes or sizes of a layer that it does not have.
    """
    method = format  # `format` is the public keyword, though it hides the builtin
    source, out = _checked_source(model), Path(out)
    check_format(method)
    if source.copied is not None and source.method == method:
        alone = source.path.is_file() and out.suffix == source.path.suffix  # the name of the file, not of its folder
        folder, name = (out.parent, out.name) if alone else (out, source.path.name)
        _write_copy(model, source, source.copied, folder, name)
    elif method in TARGETS:
        write_new(model, source, out, TARGETS[method])
    else:
        raise ValueError(
            f"export to {method!r} needs a model that was loaded from a GGUF file, whose metadata and "
            f"tokenizer it copies; this one is {source.method}; use {', '.join(map(repr, TARGETS))}"
        )


def check_format(method: str) -> None:
    """ValueError unless it is a format that `export` knows."""
    if method not in _EXPORTS:
        raise ValueError(f"export to {method!r} is not supported; supported are {', '.join(map(repr, _EXPORTS))}")


def _checked_source(model: Any) -> Source:
    source = source_of(model)
    if source is None:
        raise ValueError(
            f"this {type(model).__name__} was not loaded by qzo.from_pretrained, so there is "
            "no source to copy; load it that way, or keep its state_dict()"
        )
    source.check()
    return source


def _write_copy(model: Any, source: Source, form: Copied, folder: Path, name: str) -> None:
    """A copy of the source with the model's scales: a folder's files in `folder`, a single file there under `name`."""
    alone = source.path.is_file()
    target = folder / name if alone else folder
    if target.exists() and target.samefile(source.path):  # through whatever links
        raise ValueError(
            f"{folder} is where this model was loaded from; the source is never overwritten, give another folder"
        )
    check_free(folder, {name} if alone else {file.name for file in source.path.iterdir()})
    with files.staged(folder) as staging:
        form.save(source.path, staging / name if alone else staging, Trained(model, source).find)

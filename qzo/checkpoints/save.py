"""Models that load.py read, back to disk: in the format they came from, or in another."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, overload

from ..nn.tensor_parallel import is_sharded
from .formats import TARGETS, bnb, files, gguf
from .formats.limits import float_zeros
from .formats.protocol import Checkpoint, Copied
from .new_folder import check_free, own_target, write_biases, write_new
from .rounding_cost import rounding_losses
from .source import Source, source_of
from .trained import Trained

_EXPORTS = (*TARGETS, gguf.METHOD)
_INTEGERS = tuple(name for name in TARGETS if name != bnb.METHOD)  # whose zero points are integers


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


def export(
    model: Any,
    out: str | Path,
    format: str = "compressed-tensors",  # noqa: A002
    round_zeros: bool = False,
) -> dict[str, float] | None:
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
    round_zeros
        Change the weights where the source has zero points that are no integers (GGUF Q4_1, HQQ): they are rounded, and
        the scales of their groups refitted by least squares.

    Returns
    -------
    dict or None
        With round_zeros {layer: norm of what its weights changed by, over their own} of the layers that it changed.

    Raises
    ------
    ValueError
        Naming the layer and the reason where the format cannot hold it: a float minimum, an order of columns, bits,
        group sizes or sizes of a layer that it does not have. For round_zeros and a format without integer zero points.
    """
    method = format  # `format` is the public keyword, though it hides the builtin
    source, out = _checked_source(model), Path(out)
    check_format(method, round_zeros)
    errors = None
    if source.copied is not None and source.method == method:
        alone = source.path.is_file() and out.suffix == source.path.suffix  # the name of the file, not of its folder
        folder, name = (out.parent, out.name) if alone else (out, source.path.name)
        _write_copy(model, source, source.copied, folder, name)
    elif method in TARGETS:
        errors = write_new(model, source, out, TARGETS[method], round_zeros)
    else:
        raise _no_gguf(source.method)
    return (errors or {}) if round_zeros else None


def _no_gguf(method: str) -> ValueError:
    return ValueError(
        f"export to {gguf.METHOD!r} needs a model that was loaded from a GGUF file, whose metadata and tokenizer it "
        f"copies; this one is {method}; use {', '.join(map(repr, TARGETS))}"
    )


def check_format(method: str, round_zeros: bool = False) -> None:
    """ValueError unless it is a format that `export` knows, with integer zero points where they are asked for."""
    if method not in _EXPORTS:
        raise ValueError(f"export to {method!r} is not supported; supported are {', '.join(map(repr, _EXPORTS))}")
    if round_zeros and method not in _INTEGERS:
        raise ValueError(
            f"round_zeros is for formats that hold integer zero points only, {', '.join(_INTEGERS)}; {method} is none: "
            "leave it out"
        )


def check_source(checkpoint: Checkpoint, method: str, round_zeros: bool) -> None:
    """ValueError for a checkpoint that `export` would refuse for its kind or its float zero points; reads no weight."""
    own = checkpoint.format.method
    if method == gguf.METHOD != own:
        raise _no_gguf(own)
    if method == bnb.METHOD != own:
        raise ValueError(
            f"{checkpoint.path} is {own}, and bitsandbytes holds codes of the tables nf4 and fp4 only; qzo quantize "
            "--table nf4 makes them of a float model"
        )
    name = checkpoint.float_zeros() if method in _INTEGERS and not round_zeros else None
    if name is not None:
        raise float_zeros(f"{checkpoint.path}: {name}", method)


def _checked_source(model: Any) -> Source:
    if is_sharded(model):
        raise ValueError(
            "the model's layers are cut in parts (qzo.shard_): qzo.unshard_(model) on all ranks first, and save on "
            "one; or qzo.replay the journal on the base"
        )
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
        write_biases(model, staging)

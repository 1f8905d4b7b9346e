"""What ties a journal to a model, and a journal's steps applied to the model it was written on."""

import dataclasses
import hashlib
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..kernels.noise import VERSIONS, law_version
from ..nn.arena import ScaleArena
from ..nn.layers import arena_of, digest_parts
from ..nn.tensor_parallel import is_sharded
from ..system.progress import tracked
from ..system.ranks import Ranks
from ..version import __version__
from .journal import JournalError, Record, check_header, read
from .step import apply_steps

Held = tuple[dict[str, Any], Sequence[Sequence[Record]]]  # a journal's header, and its steps

_NEEDED = {"noise", "sharing", "law", "relative", "floor", "arena", "digest"}  # fields of the header


def replay(model: nn.Module, journal_path: str | os.PathLike[str], until: int | None = None) -> int:
    """Apply a journal's steps to the base model it was written on, in place.

    No forward runs: noise is made again from the seeds, and scales move along it by the coefficients that the journal
    holds, many steps in a pass over them (kernels/update.py). They end bit-equal to the run's with integer noise laws
    ("rademacher", "ih4").

    Parameters
    ----------
    model
        The base as it was loaded for the run: same codes, zero points and scales, same layers that train.
    journal_path
        A `journal.qzo`; it is only read. Of a model in parts (`qzo.shard_`) all ranks ask, and the first reads it.
    until
        Stop before this step, counted from 0; None: apply all.

    Returns
    -------
    int
        Number of steps applied, skipped ones among them.

    Raises
    ------
    JournalError
        A ValueError: the journal is damaged, belongs to another model, or to a noise law that this version lacks.
    FileNotFoundError
        There is no journal.
    """
    header, steps = on_all(Ranks(alone=not is_sharded(model)), lambda: _held(journal_path, until))
    arena = arena_of(model, exact=True)
    check_header(journal_path, header, model_fields(model, arena))
    apply_steps(arena, tracked(steps, "replaying", "steps"), header)
    return len(steps)


def on_all(ranks: Ranks, opened: Callable[[], Held]) -> Held:
    """What opened() gives on the first rank, on all; what it raises as `Ranks.from_first` has it."""
    if ranks.count == 1:
        return opened()

    def plain() -> list[Any]:
        header, steps = opened()
        return [header, [[dataclasses.astuple(record) for record in records] for records in steps]]

    header, steps = ranks.from_first(plain)
    return header, [[Record(*values) for values in records] for records in steps]


def _held(journal_path: str | os.PathLike[str], until: int | None) -> Held:
    found = read(journal_path)
    if found is None:
        raise JournalError(f"{journal_path} has no whole header: the run ended before its first step")
    header, steps, _ = found
    missing = sorted(_NEEDED - header.keys())
    if missing:
        raise JournalError(f"{journal_path} is not a qzo journal: its header has no {' and no '.join(missing)}")
    known = law_version(header["noise"], header["sharing"]) if header["noise"] in VERSIONS else None
    if known != header["law"]:
        raise JournalError(f"{journal_path} uses noise law {header['law']!r}, this qzo has {known!r}")
    return header, steps[:until]


def journal_header(
    module: nn.Module, group: Mapping[str, Any], recipe: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What a journal says before its first record."""
    law = {key: group[key] for key in ("noise", "relative", "sharing", "eps", "clip", "directions", "seed", "floor")}
    return {
        **law,
        "law": law_version(group["noise"], group["sharing"]),
        "recipe": recipe or {},
        **model_fields(module, arena_of(module, exact=True)),
        "versions": {"qzo": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }


def model_fields(module: nn.Module, arena: ScaleArena) -> dict[str, Any]:
    """The fields that tie a journal to a model: the arena map, and a digest of all that was quantized."""
    digest = hashlib.sha256()
    for name, what, tensor in digest_parts(module):
        digest.update(f"{name}.{what} {list(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.contiguous().cpu().numpy().data)
    return {
        "arena": {name: [slot.base4, slot.groups, slot.outputs] for name, slot in arena.slots.items()},
        "digest": "sha256:" + digest.hexdigest(),
    }

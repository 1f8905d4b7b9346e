"""`--parallel tensor`: a model is loaded in parts, one for each rank."""

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import torch

from ..checkpoints.empty import build_empty
from ..checkpoints.source import open_checkpoint
from ..checkpoints.tokenizer import load_tokenizer, tokenizer_digest
from ..nn.layers import check_sharing_of, layers
from ..nn.tensor_parallel import shard_
from ..optim.shares import TENSOR
from ..system.as_json import finite
from ..system.ranks import Ranks
from ..training.folder import versions
from ..training.settings import Settings
from .common import device_of, load, say

_BY_PLAN = f"--parallel {TENSOR} cuts layers by the model's own tp_plan"
_INSTEAD = "divide the steps (--parallel data or directions)"


def load_parts(own: Mapping[str, Any], settings: Settings, records: Mapping[str, Any]) -> Any:
    """The model, cut over the ranks, on the device of each; whole it is in the host's memory only.

    own, settings, records : options, what they make, and the lines of each split of the data

    Raises
    ------
    ValueError
        No plan, which is seen before a weight is read; one that cannot be followed, as `shard_` has it; noise shared
        by rows that are cut.
    RanksDiffer
        Other settings, data, tokenizer, device, layers or versions on some rank: seen before a forward, which waits for
        all ranks.
    """
    ranks, (device, dtype) = Ranks(), device_of(own)
    checkpoint = open_checkpoint(own["model"], bool(own["trust_remote_code"]), bool(own["weight_only"]))
    empty = build_empty(checkpoint.config, dtype, trust_remote_code=checkpoint.trust_remote_code)
    if not getattr(empty, "tp_plan", None):
        raise ValueError(f"{_BY_PLAN}, and {type(empty).__name__} has none: {_INSTEAD}")
    model = load(own["model"], {**own, "device": "cpu", "dtype": str(dtype).removeprefix("torch.")})
    found = layers(model, trainable=None)
    ranks.check_same(
        {
            "settings": finite(dataclasses.asdict(settings)),
            "data": f"sha256:{hashlib.sha256(repr(records).encode()).hexdigest()}",
            "tokenizer": tokenizer_digest(load_tokenizer(own["model"], bool(own["trust_remote_code"]))),
            "dtype": str(dtype),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "layers": {name: repr(layer) for name, layer in found.items()},
            "versions": versions(),
        }
    )
    try:
        cut = shard_(model)
    except ValueError as error:
        raise ValueError(f"{_BY_PLAN}: {error}; or {_INSTEAD}") from None
    check_sharing_of(model, settings.sharing)
    model.to(device)
    if ranks.count > 1:
        held = sum(layer.codes.nbytes for layer in found.values())
        say(f"{len(cut)} of {len(found)} layers in {ranks.count} parts, {held / 1e9:.2f} GB of codes on each rank")
    return model

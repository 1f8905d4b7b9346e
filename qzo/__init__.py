"""qzo: fine-tune 4-bit neural networks with forward passes only (QZO, arXiv 2505.13430).

The scales of a quantized model are perturbed by noise that the matmul kernels regenerate from a seed; two
losses give a directional derivative; the codes never change.

The folders are the floors that data passes through, each built on those above it:

    kernels/          what a layer computes, in Triton and in torch
    qzo/system/       disk and memory of the machine, and its ranks
    qzo/nn/           packed weights, layers, evaluations
    qzo/loss/         logits -> loss of each evaluation
    qzo/optim/        losses -> derivative -> clip -> scales, journal
    qzo/checkpoints/  files <-> models
    qzo/training/     lines of text -> batches -> steps
    qzo/trainer/      transformers' and TRL's trainers over the same step
    qzo/reports/      what a model holds, what a step needs
    bench/            how long it takes, beside others
    qzo/cli/          the commands

Importing this package imports nothing but this file: each public name is fetched when it is first used.
"""

import importlib
from typing import TYPE_CHECKING

from .version import __version__ as __version__

if TYPE_CHECKING:
    from .checkpoints.load import from_pretrained
    from .checkpoints.quantizer import QZOConfig, loading
    from .checkpoints.save import export, save_pretrained
    from .checkpoints.tokenizer import load_tokenizer
    from .kernels.noise import noise
    from .loss.losses import loss_sums, losses, pair, static_batch
    from .loss.objective import generate_texts, objective
    from .nn.arena import ScaleArena
    from .nn.choice import quantize_
    from .nn.evaluations import Evaluations
    from .nn.generating import generating
    from .nn.layers import codebooks, evaluating, scale_index, scales, train_codebooks_, train_only_
    from .nn.linear import QZOLinear
    from .nn.ops import backend
    from .nn.streaming.offload import offload, together
    from .nn.tensor_parallel import shard_, unshard_
    from .nn.weights import PackedWeight
    from .optim.journal import JournalError
    from .optim.optimizer import QZO
    from .optim.replay import replay

_HOMES = {
    "checkpoints.load": ("from_pretrained",),
    "checkpoints.quantizer": ("QZOConfig", "loading"),
    "checkpoints.save": ("export", "save_pretrained"),
    "checkpoints.tokenizer": ("load_tokenizer",),
    "kernels.noise": ("noise",),
    "loss.losses": ("loss_sums", "losses", "pair", "static_batch"),
    "loss.objective": ("generate_texts", "objective"),
    "nn.arena": ("ScaleArena",),
    "nn.evaluations": ("Evaluations",),
    "nn.generating": ("generating",),
    "nn.linear": ("QZOLinear",),
    "nn.choice": ("quantize_",),
    "nn.layers": ("codebooks", "evaluating", "scale_index", "scales", "train_codebooks_", "train_only_"),
    "nn.ops": ("backend",),
    "nn.streaming.offload": ("offload", "together"),
    "nn.tensor_parallel": ("shard_", "unshard_"),
    "nn.weights": ("PackedWeight",),
    "optim.journal": ("JournalError",),
    "optim.optimizer": ("QZO",),
    "optim.replay": ("replay",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
__all__ = [
    "QZO",
    "Evaluations",
    "JournalError",
    "PackedWeight",
    "QZOConfig",
    "QZOLinear",
    "ScaleArena",
    "backend",
    "codebooks",
    "evaluating",
    "export",
    "from_pretrained",
    "generate_texts",
    "generating",
    "load_tokenizer",
    "loading",
    "loss_sums",
    "losses",
    "noise",
    "objective",
    "offload",
    "pair",
    "quantize_",
    "replay",
    "save_pretrained",
    "scale_index",
    "scales",
    "shard_",
    "static_batch",
    "together",
    "train_codebooks_",
    "train_only_",
    "unshard_",
]


def __getattr__(name):
    """A public name, from the module that has it."""
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f".{_HOME_OF[name]}", __name__), name)
    globals()[name] = found
    return found


def __dir__():
    return sorted({*globals(), *__all__})

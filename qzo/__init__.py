"""qzo: fine-tune 4-bit neural networks with forward passes only (QZO, arXiv 2505.13430).

The scales of a quantized model are perturbed by noise that the matmul kernels regenerate from a seed; two
losses give a directional derivative; the codes never change. Importing this package touches no device.
"""
from .arena import ScaleArena
from .evaluations import Evaluations
from .hf import from_pretrained, load_tokenizer
from .journal import JournalError
from .kernels.noise import noise
from .layers import codebooks, evaluating, quantize_, scale_index, scales, train_codebooks_, train_only
from .linear import QZOLinear
from .losses import losses, pair, static_batch
from .ops import backend
from .optim import QZO, replay
from .save import export, save_pretrained
from .weights import PackedWeight

__version__ = "0.1.0.dev0"
_FROM_QUANTIZER = ("QZOConfig", "loading")
__all__ = ["QZO", "Evaluations", "JournalError", "PackedWeight", "QZOConfig", "QZOLinear", "ScaleArena", "backend",
           "codebooks", "evaluating", "export", "from_pretrained", "load_tokenizer", "loading", "losses", "noise",
           "pair", "quantize_", "replay", "save_pretrained", "scale_index", "scales", "static_batch",
           "train_codebooks_", "train_only"]


def __getattr__(name):
    """The names that need transformers, which is imported when one of them is first used."""
    if name not in _FROM_QUANTIZER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import quantizer
    return getattr(quantizer, name)

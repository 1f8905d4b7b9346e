"""A transformers model from its config alone: parameters without a byte, on the meta device."""

import contextlib

import torch
import transformers
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig

from ..system import disk
from ..system.memory import is_out_of_memory
from .formats import gguf

LEAST_LAYER_BYTES = 512  # less than a layer of any model takes, in 2 bits too


class reading(contextlib.AbstractContextManager):
    """Inside, what transformers, or a folder's own code, raises for what it cannot read is one ValueError.

    A full disk, missing memory and a file that is gone or closed to the user stay what they are.
    """

    def __init__(self, folder, what):
        self.folder, self.what = folder, what

    def __exit__(self, kind, error, trace):
        if not isinstance(error, Exception) or isinstance(error, FileNotFoundError | PermissionError):
            return
        if disk.full(error) or is_out_of_memory(error):
            return
        text = " ".join(str(error).split())
        if "trust_remote_code=True" in text:
            raise ValueError(
                f"{self.folder} brings code of its own, which is run only with trust_remote_code=True (on "
                "the command line: --trust-remote-code); read it first"
            ) from None
        named = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
        raise ValueError(f"{self.folder}: {self.what}: {named}{text:.400}") from error


def read_config(folder, trust_remote_code=False):
    """The transformers config of a folder."""
    with reading(folder, "its config.json cannot be read"):
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)


def auto_class(config):
    """The transformers class that the checkpoint's architecture asks for; one of the folder's own code by the class
    that its auto_map puts it under."""
    names = config.architectures or ["ForCausalLM"]
    names = [names] if isinstance(names, str) else names
    for name, code in (getattr(config, "auto_map", None) or {}).items():
        if name.startswith("AutoModel") and str(code).endswith(f".{names[0]}") and hasattr(transformers, name):
            return getattr(transformers, name)
    if any(part in name for name in names for part in ("ForCausalLM", "LMHeadModel")):
        return transformers.AutoModelForCausalLM
    return getattr(transformers, names[0], transformers.AutoModel)


def gguf_config(file):
    """The transformers config of a GGUFFile. ValueError for metadata that make none."""
    arguments = gguf.config(file)
    with reading(file.path, "its metadata make no model"):
        return AutoConfig.for_model(**arguments)


def check_depth(config, folder, held):
    """ValueError for a config of more layers than the files can hold: even empty ones take memory."""
    depth = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if not isinstance(depth, int) or depth * LEAST_LAYER_BYTES > held:
        raise ValueError(
            f"{folder / 'config.json'}: num_hidden_layers is {depth!r:.40}, the files have {held} bytes "
            "in all; one of them is damaged"
        )


class _EmptyOnMeta(TorchFunctionMode):
    """torch.empty makes meta tensors: parameters cost nothing, computed buffers (rotary tables) are real."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.empty:
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


def build_empty(config, dtype, cls=None, trust_remote_code=False):
    """The model of a config, its parameters on the meta device. cls: None for the transformers class it names.

    ValueError for a config that makes none.
    """
    with _EmptyOnMeta():
        if cls is not None:  # a diffusers class, whose from_config takes no dtype
            return nn.Module.to(cls.from_config(config), dtype)
        with reading(config.name_or_path or type(config).__name__, "its config makes no model"):
            cls = auto_class(config)
            if hasattr(cls, "from_config"):
                return cls.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
            return cls._from_config(config, dtype=dtype)

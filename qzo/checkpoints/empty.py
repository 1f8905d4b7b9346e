"""A transformers model from its config alone: parameters without a byte, on the meta device."""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PretrainedConfig

from .formats.reading import reading


def auto_class(config: PretrainedConfig) -> Any:
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


class _EmptyOnMeta(TorchFunctionMode):
    """torch.empty makes meta tensors: parameters cost nothing, computed buffers (rotary tables) are real."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty:
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


def build_empty(config: Any, dtype: torch.dtype, cls: Any = None, trust_remote_code: bool = False) -> Any:
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

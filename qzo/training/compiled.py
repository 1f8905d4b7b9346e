"""A model's body through torch.compile, around its quantized layers and experts, which stay calls of their own.

What lies between them (norms, rotary embeddings, activations, residuals) is fused. Code that is compiled once serves
all blocks, and knows nothing of seeds, scales or arenas: a new seed compiles nothing.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from ..loss.head import body
from ..nn.experts import Experts
from ..nn.layers import layers
from ..optim.graph import where

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHAPES = 64  # compiled forms of one piece of code: torch's own eight are fewer than a run may have


class Compiled:
    """The compiled body of a transformers model.

    backend : of torch.compile. "inductor" is asked not to choose kernels by timing them: a resumed run would choose
        others, and end in other bits.

    Each shape has code of its own (dynamic=False), for the same reason. Code that dynamo cannot trace runs as it is,
    between compiled pieces. Where the compiler fails, one warning says where, and the model runs uncompiled.
    """

    def __init__(self, model: "PreTrainedModel", backend: str | Callable[..., Any] = "inductor") -> None:
        self.base = body(model)
        inductor = backend == "inductor" and hasattr(torch._inductor.config, "deterministic")  # not in every torch
        options: dict[str, Any] | None = {"deterministic": True} if inductor else None
        self.forward = torch.compile(self.base.forward, backend=backend, dynamic=False, options=options)
        self.plain = self.base.forward
        calls = [*layers(model, trainable=None).values(), *(m for m in model.modules() if isinstance(m, Experts))]
        self.forwards = {m: torch.compiler.disable(m.forward) for m in calls} | {self.base: self._run}
        self.failed = False

    @contextlib.contextmanager
    def body(self) -> Iterator[None]:
        """Inside, the model's body runs compiled."""
        if self.failed:
            yield
            return
        before = {module: vars(module).get("forward") for module in self.forwards}
        for module, forward in self.forwards.items():
            module.forward = forward
        try:
            with torch._dynamo.config.patch(recompile_limit=SHAPES):
                yield
        finally:
            for module, forward in before.items():
                if forward is None:
                    del module.forward
                else:
                    module.forward = forward

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        if not self.failed:
            try:
                return self.forward(*args, **kwargs)
            except torch._dynamo.exc.TorchDynamoException as error:
                self.failed = True
                place = where(self.base, error, type(self.base).__name__)
                reason = " ".join(str(error).partition("\n\n")[0].split())[:160]
                warnings.warn(
                    f"compile: the compiler failed in {place} ({reason}); the model runs uncompiled", stacklevel=2
                )
        return self.plain(*args, **kwargs)

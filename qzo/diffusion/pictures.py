"""Pictures by diffusers' own pipeline, with a transformer that qzo has loaded."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from .pipeline import Pipeline
from .transformer import diffusers_module


def assemble(pipeline: Pipeline, model: Any) -> Any:
    """diffusers' pipeline of a folder with this transformer in it, all parts on its device and in its dtype."""
    cls = getattr(diffusers_module(), pipeline.index["_class_name"])
    device = next(model.parameters()).device
    pipe = cls.from_pretrained(pipeline.path, transformer=model, dtype=model.dtype).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe: Any, text: str, resolution: int, seeds: Iterable[int], steps: int, guidance: float) -> Iterator[Any]:
    """A PIL picture of each seed: `steps` evaluations of the transformer, twice each where guidance is above 1. The
    noise that it begins with is drawn on the CPU: the same on every machine."""
    for seed in seeds:
        with torch.no_grad():
            yield pipe(
                text,
                height=resolution,
                width=resolution,
                num_inference_steps=steps,
                guidance_scale=guidance,
                generator=torch.Generator().manual_seed(seed),
            ).images[0]

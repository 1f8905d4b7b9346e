"""Pictures by diffusers' own pipeline, with a transformer that qzo has loaded."""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from PIL import Image

from .families import Prompt
from .pipeline import Pipeline
from .transformer import diffusers_class


def assemble(pipeline: Pipeline, model: Any, texts: bool = True) -> Any:
    """diffusers' pipeline of a folder with this transformer in it, all parts on its device and in its dtype; texts:
    with what encodes prompts."""
    cls = diffusers_class(pipeline.index["_class_name"])
    device = next(model.parameters()).device
    absent: dict[str, None] = {} if texts else dict.fromkeys(pipeline.texts)
    options = {"transformer": model, "dtype": model.dtype, "use_safetensors": True, **absent}
    pipe = cls.from_pretrained(pipeline.path, **options).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe: Any, text: str, resolution: int, seeds: Iterable[int], steps: int, guidance: float) -> Iterator[Any]:
    """A PIL picture of each seed: `steps` evaluations of the transformer, twice each where guidance is above 1. The
    noise that it begins with is drawn on the CPU: the same on every machine."""
    for seed in seeds:
        yield _draw(pipe, resolution, seed, steps, guidance, prompt=text)


@torch.no_grad()
def _draw(pipe: Any, resolution: int, seed: int, steps: int, guidance: float, **prompt: Any) -> Any:
    return pipe(
        **prompt,
        height=resolution,
        width=resolution,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(seed),
    ).images[0]


class Grid:
    """Pictures of encoded prompts side by side, the i-th with the seed i: what a transformer draws while it trains.

    The VAE is in memory while it draws, and no text encoder is.
    prompts, empty : as the cache holds them
    steps, guidance : as for `drawn`
    """

    def __init__(
        self, pipeline: Pipeline, prompts: Sequence[Prompt], empty: Prompt, resolution: int, steps: int, guidance: float
    ) -> None:
        self.pipeline, self.prompts, self.empty = pipeline, prompts, empty
        self.resolution, self.steps, self.guidance = resolution, steps, guidance

    def draw(self, model: Any) -> Image.Image:
        """As many columns as rows, or one more."""
        pipe = assemble(self.pipeline, model, texts=False)
        edge, columns = self.resolution, math.ceil(len(self.prompts) ** 0.5)
        sheet = Image.new("RGB", (columns * edge, math.ceil(len(self.prompts) / columns) * edge), "white")
        for seed, prompt in enumerate(self.prompts):
            given = self.pipeline.family.given(prompt, self.empty)
            given = {name: value.to(model.device, model.dtype) for name, value in given.items()}
            picture = _draw(pipe, edge, seed, self.steps, self.guidance, **given)
            sheet.paste(picture, (seed % columns * edge, seed // columns * edge))
        return sheet

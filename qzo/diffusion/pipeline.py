"""A folder of a diffusers pipeline, opened: what is in it, before anything is loaded."""

import dataclasses
import math
from pathlib import Path
from typing import Any

from ..checkpoints.formats.files import read_object
from .families import Family, family_of
from .schedulers import check_flow

INDEX = "model_index.json"
MOST, MOST_BLOCKS = 1 << 20, 10  # of a number in the transformer's config; of the VAE, each halves a picture's edge


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """A pipeline of a flow-matching transformer.

    path : the folder
    index : its model_index.json, part -> [library, class]
    transformer, scheduler, vae : the configs of these parts
    """

    path: Path
    index: dict[str, Any]
    transformer: dict[str, Any]
    scheduler: dict[str, Any]
    vae: dict[str, Any]

    @property
    def family(self) -> Family:
        """What this class of transformers is given."""
        return family_of(self.transformer.get("_class_name"), self.path / "transformer")

    @property
    def texts(self) -> list[str]:
        """The parts that encode prompts, tokenizers among them."""
        return sorted(part for part in self.parts if part.startswith(("text_encoder", "tokenizer")))

    @property
    def parts(self) -> list[str]:
        """Every part that the pipeline has."""
        return _parts(self.index)

    @property
    def downscale(self) -> int:
        """Pixels of a picture along an edge of one of its latent."""
        blocks = self.vae.get("block_out_channels") or self.vae.get("encoder_block_out_channels") or ()
        return 2 ** (len(blocks) - 1)

    @property
    def channels(self) -> int:
        """Of a latent."""
        return self.transformer["in_channels"]

    def latent_size(self, resolution: int) -> int:
        """Edge of the latent of a square picture. ValueError for a resolution that has none, or no positions."""
        step = self.downscale * self.family.patch(self.transformer)
        if resolution < step or resolution % step:
            near = max(step, round(resolution / step) * step)
            raise ValueError(
                f"--resolution {resolution}: a token of {self.path} is {step} x {step} pixels ({self.downscale} of the "
                f"VAE, patches of {step // self.downscale}), which does not divide it; give {near}"
            )
        size = resolution // self.downscale
        self.family.check(self.transformer, size, size)
        return size

    def tokens(self, resolution: int) -> int:
        """How many a square picture is."""
        return (self.latent_size(resolution) // self.family.patch(self.transformer)) ** 2

    def resolution(self) -> int:
        """The edge of pictures that the transformer's config is of."""
        return self.transformer.get("sample_size", 64) * self.downscale


def open_pipeline(path: str | Path) -> Pipeline:
    """The pipeline in a folder; no weight is read.

    Raises FileNotFoundError for no folder and parts that are missing, ValueError for what is no pipeline of a
    flow-matching transformer; the message names the file or part.
    """
    path = Path(path).expanduser()
    if not (path / INDEX).is_file():
        raise FileNotFoundError(
            f"{path} holds no {INDEX}: give the folder of a diffusers pipeline, such as the one of "
            "stable-diffusion-3.5-large, or what save_pretrained of a pipeline wrote"
        )
    index = read_object(path / INDEX)
    for part in _parts(index):
        if Path(part).name != part or part == "..":
            raise ValueError(f"{path / INDEX} names {part!r:.100}, which is no folder in this one")
        if not (path / part).is_dir():
            said = " ".join(" of ".join(map(str, reversed(index[part]))).split())[:200]
            raise FileNotFoundError(
                f"{path / INDEX} names {part} ({said}), and there is no folder {path / part}: fetch it too, or load "
                "the pipeline without it and save that"
            )
    if "unet" in _parts(index):
        family_of(index["unet"][-1], path)
    for part in ("transformer", "scheduler", "vae"):
        if part not in _parts(index):
            raise ValueError(f"{path} is a {index.get('_class_name')!s:.60} without a {part}; give one that has it")
    pipeline = Pipeline(
        path.resolve(),
        index,
        read_object(path / "transformer" / "config.json"),
        read_object(path / "scheduler" / "scheduler_config.json"),
        read_object(path / "vae" / "config.json"),
    )
    family_of(pipeline.transformer.get("_class_name"), path / "transformer")
    check_flow(pipeline.scheduler, path / "scheduler")
    _check_configs(pipeline)
    return pipeline


def _check_configs(pipeline: Pipeline) -> None:
    """ValueError for a config without the names and numbers that a run goes by."""
    said: list[tuple[str, object, bool]] = []
    for key in (*pipeline.family.needed, "sample_size"):
        value = pipeline.transformer.get(key, 64 if key == "sample_size" else None)
        said.append((f"transformer/config.json: {key}", value, type(value) is int and 0 < value <= MOST))
    blocks = pipeline.vae.get("block_out_channels") or pipeline.vae.get("encoder_block_out_channels")
    said.append(
        ("vae/config.json: block_out_channels", blocks, isinstance(blocks, list) and len(blocks) <= MOST_BLOCKS)
    )
    for key in ("scaling_factor", "shift_factor"):
        value = pipeline.vae.get(key) or (0.0 if key == "shift_factor" else None)
        finite = isinstance(value, int | float) and math.isfinite(value)
        said.append((f"vae/config.json: {key}", value, finite))
    for where, config in ((INDEX, pipeline.index), ("vae/config.json", pipeline.vae)):
        name = config.get("_class_name")
        said.append((f"{where}: _class_name", name, isinstance(name, str) and name.isidentifier()))
    for where, value, fits in said:
        if not fits:
            raise ValueError(f"{pipeline.path}: {where} is {value!r:.60}; the file is damaged, fetch it again")


def _parts(index: dict[str, Any]) -> list[str]:
    return [part for part, said in index.items() if isinstance(said, list) and said and said[0] is not None]

"""Latents and encoded prompts on the disk, made once: the VAE and the text encoders are not in memory while a run goes.

    CACHE/cache.json                       digests of what made it: VAE, text encoders, resolution, length of prompts
    CACHE/latents/DIGEST.safetensors       "latent" float32 [C, H, W], by the digest of the picture's bytes
    CACHE/prompts/DIGEST.safetensors       the encoded prompt, by the digest of its text; the empty prompt is one
Each file is written whole or not at all, and what is there is not made again: a build that was killed goes on, and more
pictures are added to a cache. A latent is (z - shift_factor) * scaling_factor of one sample z of the VAE's posterior,
drawn by the picture's digest, which the pipeline undoes before it decodes.
"""

import functools
import gc
import hashlib
import json
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save

from ..checkpoints.formats import safetensors_file
from ..checkpoints.formats.files import read_object
from ..system import disk
from ..system.progress import tracked
from .families import Prompt
from .images import pixels, read_pictures, splits_of
from .pipeline import Pipeline
from .transformer import diffusers_class, empty_transformer

Encode = Callable[[torch.Tensor, str], torch.Tensor]

HEADER, LATENTS, PROMPTS = "cache.json", "latents", "prompts"
VERSION = 1
MOST_SKIPPED = 0.01  # of the pictures of a split
NAMED = 5  # pictures that a message names
_WHAT = {
    "version": "an older version of the cache",
    "vae": "another VAE",
    "texts": "other text encoders",
    "resolution": "another resolution",
    "prompt_tokens": "another length of prompts",
    "dtype": "another dtype of the text encoders",
}


class Example(NamedTuple):
    """A picture with its caption: digests, the names of their files in the cache."""

    picture: str
    prompt: str


class Latents:
    """The examples of a split in a cache. Its repr, which the journal's header digests, tells what is in it."""

    def __init__(self, folder: Path, examples: list[Example], header: Mapping[str, Any]) -> None:
        self.folder, self.examples, self.header = folder, examples, header
        self.empty_prompt = digest_of(b"")

    def __len__(self) -> int:
        return len(self.examples)

    def __repr__(self) -> str:
        return repr((dict(self.header), [tuple(example) for example in self.examples]))

    def latent(self, index: int) -> torch.Tensor:
        """float32 [C, H, W] of an example."""
        return _read(self.folder / LATENTS, self.examples[index].picture, {"latent": 3})["latent"]

    def prompt(self, index: int | None) -> Prompt:
        """The encoded prompt of an example; None: the empty one."""
        return _read(self.folder / PROMPTS, self.empty_prompt if index is None else self.examples[index].prompt, {})


def digest_of(data: bytes) -> str:
    """32 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()[:32]


def _read(folder: Path, name: str, dimensions: Mapping[str, int]) -> Prompt:
    """The tensors of a file. ValueError for one that is damaged, or has no floats of so many dimensions under one of
    these names."""
    path = folder / f"{name}.safetensors"
    try:
        found = {key: safetensors_file.read(path, place) for key, place in safetensors_file.places(path).items()}
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is gone from the cache: start again with --resume, which makes it") from None
    floats = {key: value.dim() for key, value in found.items() if value.is_floating_point()}
    if not found or any(floats.get(key) != count for key, count in dimensions.items()):
        told = ", ".join(f"{key} {value.dtype} {list(value.shape)}" for key, value in found.items())
        raise ValueError(f"{path} is damaged: it holds {told or 'nothing':.200}; delete it and start with --resume")
    return found


def build(
    pipeline: Pipeline,
    data: str | Path,
    folder: Path,
    resolution: int,
    prompt_tokens: int,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Latents]:
    """split -> Latents of the pictures in `data`, with what of them is not in the cache at `folder` made now.

    dtype : of the text encoders and of encoded prompts; the VAE runs in float32

    Raises ValueError for a cache of other inputs, data without captions, and where more than 1 % of a split's pictures
    cannot be used; up to that they are left out, counted and named in a warning.
    """
    pipeline.latent_size(resolution)
    header = _header(pipeline, folder, resolution, prompt_tokens, dtype)
    found: dict[str, Latents] = {}
    texts = {"": digest_of(b"")}
    encoder = functools.cache(lambda: vae_encoder(pipeline, device))  # where a picture is to be encoded, and not before
    for split, path in splits_of(data).items():
        examples = _encode_pictures(encoder, path, split, folder / LATENTS, resolution)
        found[split] = Latents(folder, [example for example, _ in examples], header)
        texts |= {caption: example.prompt for example, caption in examples}
    del encoder
    _encode_prompts(pipeline, texts, folder / PROMPTS, prompt_tokens, device, dtype)
    return found


def _header(
    pipeline: Pipeline, folder: Path, resolution: int, prompt_tokens: int, dtype: torch.dtype
) -> dict[str, Any]:
    """What the cache is made of; written where it begins. ValueError where the cache there is of something else."""
    held = read_header(folder)
    stamps = held.get("files", {})
    digests: dict[str, str] = {}
    files: dict[str, list[list[Any]]] = {}
    for key, parts in (("vae", ["vae"]), ("texts", pipeline.texts)):
        files[key] = _stamps(pipeline.path, parts)
        digests[key] = held.get(key, "") if stamps.get(key) == files[key] else _digest(pipeline.path, files[key])
    header = {
        "version": VERSION,
        **digests,
        "resolution": resolution,
        "prompt_tokens": prompt_tokens,
        "dtype": str(dtype).removeprefix("torch."),
    }
    for key, value in header.items():
        if held and held.get(key) != value:
            said = f" ({held.get(key)}, not {value})" if key in ("resolution", "prompt_tokens", "dtype") else ""
            raise ValueError(f"{folder} is a cache made by {_WHAT[key]}{said}: name another with --cache, or delete it")
    for part in (LATENTS, PROMPTS):
        (folder / part).mkdir(parents=True, exist_ok=True)
    disk.write_whole(folder / HEADER, (json.dumps({**header, "files": files}, indent=1) + "\n").encode())
    return header


def read_header(folder: Path) -> dict[str, Any]:
    """What the cache in a folder was made of; {} where none has begun. ValueError for a file that is damaged."""
    path = folder / HEADER
    held = read_object(path) if path.is_file() else {}
    if held and not isinstance(held.get("files"), dict):
        raise ValueError(f"{path} is damaged: it does not say which files made the cache; delete the folder")
    return held


def _stamps(folder: Path, parts: Iterable[str]) -> list[list[Any]]:
    """[name, bytes, time of the last change] of each file of these parts: the same ones are not read again."""
    files = sorted(file for part in parts for file in (folder / part).rglob("*") if file.is_file())
    return [[str(f.relative_to(folder)), f.stat().st_size, f.stat().st_mtime_ns] for f in files]


def _digest(folder: Path, stamps: list[list[Any]]) -> str:
    """Of the names and bytes of these files."""
    whole = hashlib.sha256()
    for name, size, _ in tracked(stamps, "digesting", "files"):
        with open(folder / name, "rb") as file:
            content = hashlib.sha256()
            for block in iter(lambda file=file: file.read(1 << 20), b""):  # type: ignore[misc]
                content.update(block)
            whole.update(f"{name} {size}\n".encode() + content.digest())
    return whole.hexdigest()[:32]


# ---------------------------------------------------------------------------------------------- pictures


def _encode_pictures(
    encoder: Callable[[], Encode], path: Path, split: str, folder: Path, resolution: int
) -> list[tuple[Example, str]]:
    """(Example, caption) of each picture that can be used; its latent is in the cache then."""
    examples: list[tuple[Example, str]] = []
    skipped: list[str] = []
    count = 0
    for picture in tracked(read_pictures(path, split), "encoding", "pictures"):
        count += 1
        name = digest_of(picture.data)
        file = folder / f"{name}.safetensors"
        if not file.is_file():
            try:
                image = pixels(picture, resolution)
            except ValueError as error:
                skipped.append(f"{picture.place}: {error}")
                continue
            disk.write_whole(file, save({"latent": encoder()(image, name)}))
        examples.append((Example(name, digest_of(picture.caption.encode())), picture.caption))
    if skipped:
        told = "; ".join(skipped[:NAMED]) + (f"; and {len(skipped) - NAMED} more" if len(skipped) > NAMED else "")
        if len(skipped) > MOST_SKIPPED * count:
            raise ValueError(
                f"{len(skipped)} of {count} pictures of {path} cannot be used, more than {MOST_SKIPPED:.0%}: {told}; "
                "take them out, or repair them"
            )
        warnings.warn(f"{len(skipped)} of {count} pictures of {path} are left out: {told}", stacklevel=3)
    return examples


def vae_encoder(pipeline: Pipeline, device: torch.device) -> Encode:
    """encode(float32 [3, H, W] in [-1, 1], digest) -> its latent, float32 [C, H / f, W / f] on the CPU, which does not
    depend on what was encoded before. The VAE is let go with the function."""
    cls = diffusers_class(pipeline.vae["_class_name"])
    vae = cls.from_pretrained(pipeline.path / "vae", dtype=torch.float32, use_safetensors=True).to(device).eval()
    shift, scale = pipeline.vae.get("shift_factor") or 0.0, pipeline.vae["scaling_factor"]

    @torch.no_grad()
    def encode(image: torch.Tensor, digest: str) -> torch.Tensor:
        z = posterior_sample(vae.encode(image.unsqueeze(0).to(device)), digest)
        return ((z - shift) * scale).contiguous()

    return encode


def posterior_sample(encoded: Any, digest: str) -> torch.Tensor:
    """z [C, H, W] on the CPU of what a VAE's `encode` gave: a sample of its posterior, or the latent of one that has
    none."""
    if not hasattr(encoded, "latent_dist"):
        return encoded.latent[0].float().cpu()
    mean, std = (part[0].float().cpu() for part in (encoded.latent_dist.mean, encoded.latent_dist.std))
    generator = torch.Generator().manual_seed(int(digest[:15], 16))
    return mean + std * torch.randn(mean.shape, generator=generator)


# ---------------------------------------------------------------------------------------------- prompts


def _encode_prompts(
    pipeline: Pipeline, texts: Mapping[str, str], folder: Path, length: int, device: torch.device, dtype: torch.dtype
) -> None:
    """Put what the cache lacks of {text: name} into it."""
    missing = {text: name for text, name in texts.items() if not (folder / f"{name}.safetensors").is_file()}
    if missing:
        encode = prompt_encoder(pipeline, device, dtype, length)
        for text, name in tracked(missing.items(), "encoding", "prompts"):
            disk.write_whole(folder / f"{name}.safetensors", save(encode(text)))
        del encode
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def prompt_encoder(
    pipeline: Pipeline, device: torch.device, dtype: torch.dtype, length: int
) -> Callable[[str], Prompt]:
    """encode(text) -> the encoded prompt on the CPU, by the pipeline's own encode_prompt; the text encoders are let go
    with the function."""
    cls = diffusers_class(pipeline.index["_class_name"])
    shell = empty_transformer(pipeline, dtype)  # its config is asked for
    pipe = cls.from_pretrained(pipeline.path, transformer=shell, vae=None, dtype=dtype, use_safetensors=True)
    for part in pipeline.texts:
        if part.startswith("text_encoder"):
            getattr(pipe, part).to(device).eval()

    @torch.no_grad()
    def encode(text: str) -> Prompt:
        encoded = pipeline.family.encode(pipe, text, device, length)
        return {name: value.cpu().contiguous() for name, value in encoded.items()}

    return encode

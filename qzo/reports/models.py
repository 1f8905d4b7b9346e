"""A model from its config alone: on the meta device to predict its memory, or with random weights to run it.

Configs are those of Hugging Face: a transformers config.json, or that of a diffusers SD3 transformer. configs/ holds
those of the models in the README.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import CONFIG_MAPPING, AutoConfig

from ..checkpoints.empty import build_empty, reading
from ..checkpoints.names import Names
from ..kernels.vectors import LENGTH
from ..loss.head import body
from ..loss.losses import losses, pair
from ..nn.choice import sizes_of
from ..nn.experts import split_, split_experts_, stack_of
from ..nn.layers import arena_of, layers
from ..nn.linear import QZOLinear
from ..nn.weights import PackedWeight, check_group_size
from ..system.progress import tracked

CONFIGS = Path(__file__).resolve().parent / "configs"
ZEROS = {"none": None, "integer": torch.uint8, "float": torch.float32}
DIFFUSION = "SD3Transformer2DModel"
PIXELS = 8  # along an edge of one of a latent, by the VAE of Stable Diffusion 3
TEXT_TOKENS = 333  # of a Stable Diffusion 3 prompt: 77 of CLIP and 256 of T5


def shipped() -> list[str]:
    """Names of the configs that come with qzo."""
    return sorted(path.stem for path in CONFIGS.glob("*.json"))


def read_config(name: str | Path) -> dict[str, Any]:
    """The JSON of a config file, of a folder's config.json, or of a shipped config by (part of) its name.

    Raises ValueError naming the shipped ones when `name` is neither, or is no config.
    """
    path = Path(name)
    if path.is_dir():
        path /= "config.json"
    if not path.is_file():
        part = path.name.removesuffix(".json").lower()
        found = [known for known in shipped() if part and part in known]
        if len(found) != 1:
            raise ValueError(
                f"{name} is no file, and {'no' if not found else 'more than one'} config of that name "
                f"comes with qzo; there are {', '.join(shipped())}"
            )
        path = CONFIGS / f"{found[0]}.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict) or not ("model_type" in config or config.get("_class_name") == DIFFUSION):
        raise ValueError(f"{path} is no config: expected a model_type of transformers, or _class_name {DIFFUSION}")
    return config


def sized(config: dict[str, Any], resolution: int | None) -> dict[str, Any]:
    """The config of an image model with latents for pictures of this edge, in pixels; None: as it is.

    ValueError for a text model, and for an edge that its patches do not divide.
    """
    if resolution is None:
        return config
    if config.get("_class_name") != DIFFUSION:
        raise ValueError(f"--resolution {resolution} is of image models, and this config is of {config['model_type']}")
    step = PIXELS * config["patch_size"]
    if resolution < step or resolution % step:
        raise ValueError(
            f"--resolution {resolution}: a token is {step} x {step} pixels; give {max(1, resolution // step) * step}"
        )
    return config | {"sample_size": resolution // PIXELS}


def is_diffusion(model: Any) -> bool:
    return type(model).__name__ == DIFFUSION


def body_of(model: Any) -> nn.Module:
    """The module whose forward ends before the loss begins."""
    return model if is_diffusion(model) else body(model)


def usual_tokens(model: Any) -> int:
    """Tokens a row, where none are given: an SST-2 prompt's at the most, or the text of an image."""
    return TEXT_TOKENS if is_diffusion(model) else 64


def dimensions(model: Any, tokens: int) -> tuple[int, int, int, int]:
    """(hidden size, blocks, vocabulary, tokens a row runs through the blocks)."""
    if is_diffusion(model):
        c = model.config
        return (
            c.num_attention_heads * c.attention_head_dim,
            c.num_layers,
            0,
            tokens + (c.sample_size // c.patch_size) ** 2,
        )
    c = model.config.get_text_config()
    return c.hidden_size, c.num_hidden_layers, c.vocab_size, tokens


def empty_model(config: dict[str, Any], dtype: torch.dtype) -> Any:
    """The model of a config: parameters on the meta device, computed buffers real, nothing quantized.

    Raises ValueError for a model_type that the installed transformers lacks, for values that make no config, or where
    diffusers is missing.
    """
    if "model_type" in config:
        kind = config["model_type"]
        if kind not in CONFIG_MAPPING:
            raise ValueError(f"model_type {kind!r} is not known to the installed transformers")
        with reading(f"the config of model_type {kind!r}", "it cannot be read"):
            known = AutoConfig.for_model(**{k: v for k, v in config.items() if k != "quantization_config"})
        model = build_empty(known, dtype).eval()
        split_experts_(model)  # as from_pretrained does
        return model
    try:
        import diffusers
    except ImportError:
        raise ValueError(f"a {DIFFUSION} needs diffusers: pip install diffusers") from None
    return build_empty(config, dtype, getattr(diffusers, DIFFUSION)).eval()


def empty_like(model: Any, trust_remote_code: bool = False, latent: int | None = None) -> Any:
    """A model of the config of one that is loaded, on the meta device; latent: edge of the latents, None for its own.

    ValueError for a diffusion transformer other than Stable Diffusion 3's.
    """
    if hasattr(model.config, "get_text_config"):
        return build_empty(model.config, model.dtype, trust_remote_code=trust_remote_code).eval()
    if not is_diffusion(model):
        raise ValueError(f"of diffusion transformers {DIFFUSION} is known")
    config = dict(model.config) | ({} if latent is None else {"sample_size": latent})
    return build_empty(config, model.dtype, type(model)).eval()


@dataclasses.dataclass(frozen=True)
class Form:
    """What a layer's memory depends on, beside its shape. zeros: None or the dtype of stored zero points; ordered: its
    columns are sorted by group (act-order); books: codebooks, of 2^bits vectors in
    book_dtype."""

    group_size: int
    zeros: torch.dtype | None = None
    bits: int = 4
    table: tuple | None = None
    ordered: bool = False
    books: int = 0
    book_dtype: torch.dtype = torch.float16


def form_of(packed: PackedWeight | QZOLinear) -> Form:
    """Form of a PackedWeight or QZOLinear."""
    zeros = None if packed.zeros is None else packed.zeros.dtype
    books = 0 if packed.codebooks is None else len(packed.codebooks)
    return Form(
        packed.in_features if books else packed.group_size,
        zeros,
        packed.bits,
        packed.table,
        packed.perm is not None,
        books,
        Form.book_dtype if packed.codebooks is None else packed.codebooks.dtype,
    )


def stored_forms(model: Any, entries: Iterable[tuple[str, Any, Any]], where: str | Path) -> dict[str, Form]:
    """{layer: Form} of what the entries of the checkpoint at `where` hold in codes, by the model's names; the model is
    on the meta device. ValueError as find_homes."""
    names = Names(model)
    read = tracked(entries, "reading", "tensors", len(names.known))
    forms = {names(name): form_of(value) for name, value, _ in read if isinstance(value, PackedWeight)}
    wanted = {name.removesuffix(".weight"): form for name, form in forms.items()}
    find_homes(model, wanted, where)
    return wanted


def find_homes(model: Any, wanted: Mapping[str, Form], where: str | Path) -> None:
    """Split the experts of the model that are among {layer: Form}. ValueError naming the checkpoint for layers that are
    no Linear of the model, and for none."""
    for stack in filter(None, (stack_of(model, f"{name}.weight") for name in wanted)):
        split_(model, stack)
    linears = {name for name, module in model.named_modules() if sizes_of(module)}
    strangers = sorted(set(wanted) - linears)
    if strangers:
        raise ValueError(
            f"{where}: quantized weights for {strangers[0]}, which is no nn.Linear of {type(model).__name__}; only "
            "nn.Linear and transformers' Conv1D can be replaced"
        )
    if not wanted:
        raise ValueError(f"{where} holds no quantized linear layer, so there is nothing to train")


def quantize_empty(model: Any, wanted: Mapping[str, Form], cpu: bool = False) -> Any:
    """Replace Linears by QZOLinears on the meta device, in place. wanted: name -> Form.

    cpu: codes as the CPU keeps them, else as the GPU does.
    """
    for name, form in wanted.items():
        linear = model.get_submodule(name)
        sizes = sizes_of(linear)
        assert sizes is not None, f"{name} can be quantized"
        n, k = sizes
        group = check_group_size(form.group_size, k)
        books = torch.empty(form.books, 1 << form.bits, LENGTH, dtype=form.book_dtype, device="meta")
        packed = PackedWeight.on_meta(
            (n, k), group, form.bits, form.zeros, cpu, form.table, books if form.books else None
        )
        packed.perm = torch.empty(k, dtype=torch.int64, device="meta") if form.ordered else None
        owner, _, child = name.rpartition(".")
        setattr(model.get_submodule(owner), child, QZOLinear.from_packed(packed, linear.bias))
    arena_of(model, exact=True)
    return model.requires_grad_(False)


def fill_random(model: Any, device: str | torch.device, seed: int = 0) -> Any:
    """Random weights for everything on meta, in place, on `device`; in the order of names, a layer at a time.

    Scales are such that outputs keep the size of inputs.
    """
    generator = torch.Generator(device).manual_seed(seed)
    arena = arena_of(model, exact=True)
    arena.data = torch.zeros_like(arena.data, device=device)
    for layer in layers(model).values():
        k, n = layer.in_features, layer.out_features
        size = k**-0.5 / _spread(layer)
        scales = torch.empty(k // layer.group_size, n, device=device).uniform_(
            0.9 * size, 1.1 * size, generator=generator
        )
        if layer.codebooks is not None:
            shape, books = (n, k // LENGTH, len(layer.codebooks)), layer.codebooks
            codes = torch.randint(0, 1 << layer.bits, shape, dtype=torch.int32, generator=generator, device=device)
            layer.codebooks = torch.empty(books.shape, dtype=books.dtype, device=device).normal_(generator=generator)
            layer.codes = PackedWeight.from_vectors(codes, scales[0], layer.codebooks).codes
        else:
            codes = torch.randint(0, 1 << layer.bits, (n, k), dtype=torch.uint8, generator=generator, device=device)
            layer.codes = PackedWeight.from_codes(codes, scales, bits=layer.bits, table=layer.table).codes
        arena.write(layer.arena_name, scales)
        if layer.zeros is not None:
            layer.zeros = torch.full(layer.zeros.shape, 1 << layer.bits - 1, dtype=layer.zeros.dtype, device=device)
    return fill_parameters(model, device, generator)


def fill_parameters(model: Any, device: str | torch.device, generator: torch.Generator) -> Any:
    """Random numbers for the parameters on meta, in place, on `device`: 1 for norms, 0 for biases."""
    for owner in model.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None and parameter.is_meta:
                filled = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                if parameter.dim() == 1:
                    filled.fill_(0.0 if name == "bias" else 1.0)
                else:
                    filled.normal_(0.0, 0.02, generator=generator)
                setattr(owner, name, nn.Parameter(filled, requires_grad=False))
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    return model.to(device)


def _spread(layer: QZOLinear) -> float:
    """Standard deviation of what uniform codes stand for."""
    if layer.codebooks is not None:
        return len(layer.codebooks) ** 0.5
    return 0.29 * 2**layer.bits if layer.table is None else float(torch.tensor(layer.table).std(correction=0))


def example_batch(
    model: Any, rows: int, tokens: int, labels: int, device: str | torch.device
) -> dict[str, torch.Tensor]:
    """A batch of `rows` rows: token ids with `labels` labelled positions a row, the first row half padding where there
    are several; or, for a diffusion transformer, latents of the config's size and `tokens` tokens of text.

    ValueError when there are more labels than tokens to predict.
    """
    generator = torch.Generator().manual_seed(0)
    if is_diffusion(model):
        c = model.config
        size = (rows, c.in_channels, c.sample_size, c.sample_size)
        return {
            "hidden_states": torch.randn(size, generator=generator).to(device, model.dtype),
            "encoder_hidden_states": torch.randn(rows, tokens, c.joint_attention_dim, generator=generator).to(
                device, model.dtype
            ),
            "pooled_projections": torch.randn(rows, c.pooled_projection_dim, generator=generator).to(
                device, model.dtype
            ),
            "timestep": torch.full((rows,), 500.0).to(device),
            "target": torch.randn(size, generator=generator).to(device),
        }
    if not 1 <= labels < tokens:
        raise ValueError(
            f"{labels} labelled positions (--labels) in rows of {tokens} tokens (--seq-len): between 1 and "
            f"{tokens - 1} can be predicted"
        )
    vocabulary = model.config.get_text_config().vocab_size
    shape, empty = (rows, tokens), device == "meta"  # a batch that is only predicted may be larger than the machine
    ids = (
        torch.empty(shape, dtype=torch.int64, device=device)
        if empty
        else torch.randint(0, vocabulary, shape, generator=generator)
    )
    mask = torch.ones_like(ids)
    if rows > 1:
        mask[0, tokens // 2 :] = 0
    target = torch.full_like(ids, -100)
    target[:, -labels:] = ids[:, -labels:]
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device), "labels": target.to(device)}


def batch_losses(model: Any, batch: Mapping[str, torch.Tensor], copies: int) -> torch.Tensor:
    """float32 [copies]: next-token cross entropy, or mean squared error of what a diffusion transformer predicts."""
    if not is_diffusion(model):
        return losses(model, batch, copies)
    stacked = pair(batch, copies)
    target = stacked.pop("target")
    with torch.no_grad():
        predicted = model(**stacked, return_dict=False)[0].float()
        each = functional.mse_loss(predicted, target, reduction="none").flatten(1).mean(1)
    return each.view(copies, -1).mean(1)

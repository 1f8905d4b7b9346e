"""What other ways to train the same model need, by their published formulas, and the cards that hold so much."""

from collections.abc import Mapping
from typing import Any

from ..nn.layers import layers
from . import models

# capacity counted at 1e9 bytes per GB: the rest of a card's binary gigabytes is left to the driver and its context
CARDS = {
    "8 GB (RTX 4060)": 8,
    "12 GB (RTX 3060)": 12,
    "16 GB (RTX 4080)": 16,
    "24 GB (RTX 3090, RTX 4090, L4)": 24,
    "32 GB (RTX 5090)": 32,
    "40 GB (A100)": 40,
    "48 GB (L40S)": 48,
    "80 GB (A100, H100)": 80,
    "141 GB (H200)": 141,
}


def rivals(model: Any, rows: int, tokens: int, evaluations: int, predicted: Mapping[str, int]) -> dict[str, int]:
    """name -> bytes that other ways to train the same model need, by their published formulas.

    MeZO (arXiv 2305.17333): 16-bit weights and the forward of one evaluation. QLoRA (arXiv 2305.14314): 4.127 bits per
    weight of the linears, rank-16 adapters in bfloat16 with their gradients and two float32 moments, activations under
    full recomputation. AdamW: 16 bytes per parameter (ZeRO, arXiv 1910.02054, mixed precision) and all activations.
    Activations by arXiv 2205.05198: a layer keeps 34 tokens x hidden bytes with fused attention, 2 under full
    recomputation (and once 34), float32 logits 4 tokens x vocabulary.
    """
    linear = {name: (m.in_features, m.out_features) for name, m in layers(model, trainable=None).items()}
    weights = sum(k * n for k, n in linear.values())
    rest = sum({id(p): p.numel() for p in model.parameters()}.values())
    hidden, depth, vocabulary, tokens = models.dimensions(model, tokens)
    layer = rows * tokens * hidden
    logits = 4 * rows * tokens * vocabulary
    adapters = 16 * sum(k + n for k, n in linear.values())
    forward = (predicted["activations"] + predicted["logits"]) // evaluations
    return {
        "MeZO, 16 bit": 2 * (weights + rest) + forward,
        "QLoRA, NF4, rank 16": (
            round(weights * 4.127 / 8) + 2 * rest + 12 * adapters + (2 * depth + 34) * layer + logits
        ),
        "AdamW, all parameters": 16 * (weights + rest) + 34 * depth * layer + logits,
    }


def fits(nbytes: float) -> list[str]:
    """The cards whose memory holds so much."""
    return [card for card, size in CARDS.items() if nbytes <= size * 1e9]

"""Trains the base first-order on Twitter's emoji, quantizes it and writes base.safetensors.

python -m examples.emoji.train_base --data data
"""

import argparse
from pathlib import Path

from examples.emoji.emoji import BASE, EMPTY, GROUP, SIZE, WIDTH, split
from examples.shared.flow import BaseRecipe, quantized, save_base, train_base

RECIPE = BaseRecipe(
    config={
        "sample_size": SIZE,
        "patch_size": 4,
        "in_channels": 3,
        "out_channels": 3,
        "num_layers": 3,
        "num_attention_heads": 4,
        "attention_head_dim": 32,
        "caption_projection_dim": 128,
        "joint_attention_dim": WIDTH,
        "pooled_projection_dim": WIDTH,
        "pos_embed_max_size": 4,
    },
    steps=750,
    period=1500,
    batch=64,
)


def main() -> None:
    """Trains, quantizes, writes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="the folder of both packages")
    training, _ = split(parser.parse_args().data, "twitter")
    save_base(quantized(train_base(RECIPE, training.data, EMPTY), GROUP), BASE)
    print(f"{BASE}: {BASE.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()

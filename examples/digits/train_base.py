"""Trains the base first-order on the digits but 9, quantizes it and writes base.safetensors: minutes on one core.

python -m examples.digits.train_base
"""

from examples.digits.digits import BASE, EMPTY, GROUP, UNSEEN, Digits, load, prompts
from examples.shared.flow import BaseRecipe, quantized, save_base, train_base

RECIPE = BaseRecipe(
    config={
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 1,
        "out_channels": 1,
        "num_layers": 3,
        "num_attention_heads": 3,
        "attention_head_dim": 32,
        "caption_projection_dim": 96,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 32,
        "pos_embed_max_size": 4,
    },
    steps=1000,
    period=3000,  # what it draws is read well long before
    batch=128,
)


def shown(training: Digits) -> Digits:
    """What the base sees."""
    return training.where(training.labels != UNSEEN)


def main() -> None:
    """Trains, quantizes, writes."""
    base = train_base(RECIPE, shown(load()[0]).prompted(), prompts()[EMPTY])
    save_base(quantized(base, GROUP), BASE)
    print(f"{BASE}: {BASE.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()

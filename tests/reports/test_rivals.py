"""What rivals need, by formulas that are worked out here once more by hand, and the cards that hold so much."""

import pytest
import torch

from qzo.reports import models
from qzo.reports.memory import Run
from qzo.reports.rivals import CARDS, fits, rivals

HIDDEN, INNER, VOCABULARY = 64, 96, 48
CONFIG = {
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": True,
}
WEIGHTS = 2 * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * INNER)
REST = VOCABULARY * HIDDEN + 5 * HIDDEN  # a head tied to the embeddings, and five norms


@pytest.fixture(scope="module")
def model():
    made = models.empty_model(CONFIG, torch.float16)
    names = [name for name, _ in made.named_modules() if name.endswith("_proj")]
    return models.quantize_empty(made, dict.fromkeys(names, models.Form(32)))


@pytest.mark.parametrize(
    "run", [Run(), Run(rows=3, tokens=10, directions=4), Run(rows=3, directions=4, sequential=True)]
)
def test_by_their_published_formulas(model, run):
    found = rivals(model, run.rows, run.tokens, run.evaluations, {"activations": 8000, "logits": 800})
    tokens = run.rows * run.tokens
    at_once = 1 if run.sequential else 2 * run.directions
    assert found["MeZO, 16 bit"] == 2 * (WEIGHTS + REST) + 8800 // at_once, "the forward of one evaluation"
    assert found["AdamW, all parameters"] == 16 * (WEIGHTS + REST) + 34 * 2 * tokens * HIDDEN + 4 * tokens * VOCABULARY
    adapters = 16 * 2 * (4 * (HIDDEN + HIDDEN) + 3 * (HIDDEN + INNER))
    kept = (2 * 2 + 34) * tokens * HIDDEN + 4 * tokens * VOCABULARY
    assert found["QLoRA, NF4, rank 16"] == round(WEIGHTS * 4.127 / 8) + 2 * REST + 12 * adapters + kept
    assert len(found) == 3


def test_cards_are_those_that_hold_it():
    assert fits(23.9e9)[0].startswith("24 GB")
    assert fits(24e9)[0].startswith("24 GB"), "all of it"
    assert fits(24.1e9)[0].startswith("32 GB")
    assert fits(0) == list(CARDS)
    assert fits(1e12) == []
    assert list(CARDS.values()) == sorted(CARDS.values())
    assert all(name.startswith(f"{size} GB") for name, size in CARDS.items())

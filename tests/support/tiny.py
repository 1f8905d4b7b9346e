"""A tiny random Llama with a tokenizer of words, saved as a float checkpoint, and a task for it."""

import json
from typing import Any

import torch

WORDS = [
    "red",
    "green",
    "blue",
    "stone",
    "leaf",
    "sky",
    "fire",
    "water",
    "Topic",
    "Headline",
    ":",
    "up",
    "down",
    "left",
    "right",
    "warm",
    "cold",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
]
RECORDS: list[dict[str, Any]] = [
    {"prompt": f"Headline : {a} {b}", "options": ["warm", "cold"], "label": int(a in ("blue", "sky", "water"))}
    for a in ("red", "fire", "blue", "sky", "water", "leaf")
    for b in ("one", "two", "three", "four")
]


def save_checkpoint(folder, hidden=64, layers=2, key_heads=1):
    """config.json, safetensors and tokenizer files."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=key_heads,
        vocab_size=len(vocabulary),
        max_position_embeddings=64,
        initializer_range=0.2,
        eos_token_id=1,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def write_jsonl(path, records):
    """The records, one a line; returns the path."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def stands_for_the_demos(folder, monkeypatch, demo):
    """The tiny model in 4 bits, and its records, in place of the model and the headlines of training/demo.py."""
    import pytest

    import qzo

    base = save_checkpoint(folder / "base")
    with pytest.warns(UserWarning, match="group_size"):
        qzo.save_pretrained(qzo.from_pretrained(base, device="cpu"), folder / "tiny")
    monkeypatch.setattr(demo, "model_file", lambda: folder / "tiny")
    monkeypatch.setattr(demo, "headlines", lambda: (RECORDS, []))
    monkeypatch.setattr(demo, "TRAIN_LAYERS", 1)

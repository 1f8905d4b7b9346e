"""GGUF tokenizers in few words: metadata without a file, and small files that hold nothing else."""

import types

import gguf
import numpy as np
from transformers.convert_slow_tokenizer import bytes_to_unicode

import qzo
from qzo.checkpoints.formats import gguf_tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
SPELLED = bytes_to_unicode()  # byte -> the character that byte-level BPE spells it with
LETTERS = list(SPELLED.values())
BYTES = [f"<0x{i:02X}>" for i in range(256)]
TEXTS = [
    "In 1999, 12 cats",
    "  7",
    "list:\n    1\n    2",
    "I'LL DON'T we've",
    "3 33 333 3333 33333 3333333",
    "a\n\n\n b \r\n\t c ",
    "na\u00efve caf\u00e9 \u6771\u4eac \U0001f642",
    "\u00e9l\u00c9cole ABCdef",
    "\u017f's '\u017f",
    "\u0939\u093f\u0928\u094d\u0926\u0940 \u0967\u0968\u0969",
    "x**2 + 10_000 //--!!",
    "<|a|> $5 = ~^`| @#%&",
    "\uac00\ub098 \u30ab\u30ca\u3000\u5168\u89d2\u3002",
    "\u00bd \u00b2 \u2167",
]


def file_of(architecture="llama", rows=None, **metadata):
    """What a tokenizer is made from: metadata under tokenizer.ggml, None for a key that is not there."""
    found = {f"tokenizer.ggml.{name}": value for name, value in metadata.items() if value is not None}
    tensors = {} if rows is None else {"token_embd.weight": types.SimpleNamespace(shape=(rows, 32))}
    return types.SimpleNamespace(
        path="m.gguf", tensors=tensors, metadata={"general.architecture": architecture} | found
    )


def byte_level(pre, merges=(), more=(), **metadata):
    """A file of all bytes, of what the merges make, and `more`: (token, type)."""
    made = ["".join(merge.split(" ")) for merge in merges]
    tokens = [*LETTERS, *made, *(token for token, _ in more)]
    kinds = [NORMAL] * (256 + len(made)) + [kind for _, kind in more]
    return file_of(
        **{"model": "gpt2", "pre": pre, "tokens": tokens, "token_type": kinds, "merges": list(merges)} | metadata
    )


def words(pre, text):
    """The words that BPE gets, as text."""
    splitter = gguf_tokenizer.load(byte_level(pre)).backend_tokenizer.pre_tokenizer
    back = {character: byte for byte, character in SPELLED.items()}
    return [bytes(back[c] for c in word).decode() for word, _ in splitter.pre_tokenize_str(text)]


def write(path, architecture, model, tokens, kinds, **more):
    """A file of a tokenizer and an embedding; its tokenizer as qzo loads it."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(32)
    writer.add_block_count(1)
    writer.add_head_count(1)
    writer.add_tokenizer_model(model)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    for name, value in more.items():
        getattr(writer, f"add_{name}")(value)
    writer.add_tensor("token_embd.weight", np.zeros((len(tokens), 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return qzo.load_tokenizer(path)

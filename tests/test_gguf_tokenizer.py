"""Tokenizers of GGUF files that are left to transformers; test_gguf.py has the one that is built here."""
import gguf
import numpy as np
import pytest
from transformers.convert_slow_tokenizer import bytes_to_unicode

import qzo

NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6


def write(path, architecture, model, tokens, kinds, **more):
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


def test_qwen2_splits_digits_and_keeps_control_tokens(tmp_path):
    letters = list(bytes_to_unicode().values())
    tokens = [*letters, "he", "ll", "hell", "12", "<|im_start|>", "<|im_end|>"]
    tokenizer = write(tmp_path / "m.gguf", "qwen2", "gpt2", tokens, [NORMAL] * 260 + [CONTROL] * 2,
                      tokenizer_pre="qwen2", token_merges=["h e", "l l", "he ll", "1 2"], eos_token_id=261,
                      add_bos_token=False)
    text = "hello 12<|im_end|>"
    assert tokenizer.tokenize(text) == ["hell", "o", "\u0120", "1", "2", "<|im_end|>"]
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.eos_token_id == 261


@pytest.mark.parametrize(("architecture", "pieces"), [
    ("llama", ["\u2581hell", "o"]), ("gemma3", ["hell", "o"]), ("phi3", ["\u2581hell", "o"])])
def test_sentencepiece_begins_as_the_family_does(tmp_path, architecture, pieces):
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "\u2581", *"helo", "he", "ll",
              "hell", "\u2581hell"]
    kinds = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * 9]
    tokenizer = write(tmp_path / "m.gguf", architecture, "llama", tokens, kinds, bos_token_id=1,
                      token_scores=[0.0] * 259 + [-float(i) for i in range(9)], eos_token_id=2,
                      add_bos_token=True)
    assert tokenizer.convert_ids_to_tokens(tokenizer("hello").input_ids) == ["<s>", *pieces]
    assert tokenizer.tokenize("hello hell")[-1] == "\u2581hell"

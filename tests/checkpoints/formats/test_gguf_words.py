"""tokenizer.ggml.pre: how a text is split into words."""

import random

import pytest
import regex

from qzo.checkpoints.formats import gguf_tokenizer, gguf_words
from tests.support.gguf_tokens import BYTES, TEXTS, byte_level, file_of, words

# what the models' own tokenizers publish (tokenizer.json, tekken.json, tiktoken), for another engine of regexes
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)"
    r"|\s+"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
KIMI = O200K.replace(r"\p{M}]", r"\p{M}&&[^\p{Han}]]").replace("/]*", "]*")
PUBLISHED = {
    "gpt-2": [GPT2],
    "smollm": [r"\p{N}", GPT2],
    "llama-bpe": [QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")],
    "qwen2": [QWEN2],
    "gpt-4o": [O200K],
    "tekken": [O200K.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)?", "").replace(r"\p{N}{1,3}", r"\p{N}")],
    "deepseek-v3": [r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+", DEEPSEEK3],
    "kimi-k2": [r"\p{Han}+|" + KIMI],
    "qwen35": [QWEN2.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]")],
    "bailingmoe": [
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]"
        r"|\s+(?!\S)|\s+"
    ],
    "falcon": [r"[!-/:-@\[-`{-~\p{P}]+", GPT2, "[0-9][0-9][0-9]"],
}


def split(patterns, text):
    """Each regex on the pieces that the one before left: matches, and what lies between them."""
    pieces = [text]
    for pattern in patterns:
        found = []
        for piece in pieces:
            last = 0
            for match in regex.finditer(pattern, piece, regex.V1):
                found += [piece[last : match.start()], match.group()]
                last = match.end()
            found.append(piece[last:])
        pieces = [piece for piece in found if piece]
    return pieces


@pytest.mark.parametrize("pre", PUBLISHED)
def test_published_regexes_split_alike_in_another_engine(pre):
    draw = random.Random(pre)
    pool = "aAbZ\u00e9\u00c91\u0662\u00bd \n\t'sST.,!/\u4e2d\u3042\uac00\u093f\u3000\u00a0\U0001f600\u00df\u03a3()|$+<"
    for text in [*TEXTS, *("".join(draw.choices(pool, k=40)) for _ in range(100))]:
        assert words(pre, text) == split(PUBLISHED[pre], text), text


@pytest.mark.parametrize(
    ("pre", "text", "expected"),
    [
        ("smollm", "  7", ["  ", "7"]),
        ("gpt-2", "  7", [" ", " 7"]),
        ("default", "a 12345?!", ["a", " ", "123", "45", "?!"]),
        ("starcoder", " 12", [" ", "1", "2"]),
        ("deepseek-llm", "ab 123\n\n", ["ab", " ", "123", "\n", "\n"]),
        ("deepseek-coder", "x=12 ", ["x", "=", "1", "2", " "]),
        ("bloom", "one two, three", ["one", " two", ",", " three"]),
        ("viking", "one 12", ["one", " ", "1", "2"]),
        ("superbpe", "by the way 12345", ["by the way ", "12", "345"]),
        ("afmoe", "1234567 ab", ["1", "234", "567", " ab"]),
        ("tiny_aya", "1234567 ab", ["1", "234", "567", " ab"]),
        ("jais-2", "a   b", ["a", "  ", " b"]),
        ("exaone-moe", "one two 3", ["one two", " ", "3"]),
        ("seed-coder", "?!\n\na", ["?!", "\n\n", "a"]),
        ("qwen2", "?!\n\na", ["?!\n\n", "a"]),
        ("spark2_5", "?!\n\na", ["?!", "\n", "\n", "a"]),
        ("ufakzeka", "Ali'den", ["Ali", "'den"]),
        ("qwen2", "Ali'den", ["Ali", "'d", "en"]),
        ("laguna", "a?\nb", ["a", "?", "\n", "b"]),
        ("minicpm5", "a  12345", ["a", "  ", "123", "45"]),
        ("youtu", "\u3105a\uff0c", ["\u3105", "a", "\uff0c"]),
        ("spark2_5", "\u6771\u4eacabc", ["\u6771\u4eac", "abc"]),
        ("afmoe", "\u6771\u4eacabc", ["\u6771\u4eac", "abc"]),
        ("deepseek-llm", "\u00fcn\u00ef!", ["\u00fc", "n", "\u00ef", "!"]),
        ("youtu", "\u3131a 12", ["\u3131", "a", " ", "1", "2"]),
        ("chameleon", "aIMGIMGABZa  a.", ["a", "IMGIMGABZ", "a", "  ", "a", "."]),
        ("kimi-k2", "\u6771\u4eacabc", ["\u6771\u4eac", "abc"]),
    ],
)
def test_words(pre, text, expected):
    assert words(pre, text) == expected


def test_every_rule_gives_the_text_back():
    for pre, rule in gguf_words.RULES.items():
        tokens = [] if rule.byte_level else [*BYTES, "\u2581"]
        tokenizer = gguf_tokenizer.load(
            byte_level(pre) if rule.byte_level else file_of(model="gpt2", pre=pre, tokens=tokens, merges=[])
        )
        for text in TEXTS:
            assert tokenizer.decode(tokenizer(text).input_ids) == text, (pre, text)


def test_words_that_are_tokens_are_whole_where_the_rule_says_so():
    tokens = [("hello", 1)]  # no merge makes it
    for pre, whole in {"llama-bpe": True, "tekken": True, "youtu": True, "qwen2": False, "dbrx": False}.items():
        assert gguf_tokenizer.load(byte_level(pre, more=tokens)).tokenize("hello") == (
            ["hello"] if whole else [*"hello"]
        ), pre


def test_accents_are_composed_where_the_models_own_tokenizers_do_so():
    for pre in ("qwen2", "qwen35", "command-r", "mpt", "olmo", "llama-bpe", "gpt-2", "tekken"):
        composed = pre in ("qwen2", "qwen35", "command-r", "mpt", "olmo")
        tokenizer = gguf_tokenizer.load(byte_level(pre))
        assert (tokenizer("e\u0301").input_ids == tokenizer("\u00e9").input_ids) == composed, pre


@pytest.mark.parametrize("pre", ["qwen99", "gpt2-ish", "whitespace", 7, 0])
def test_a_rule_that_is_not_known_is_refused(pre):
    with pytest.raises(ValueError, match=f"m.gguf: tokenizer.ggml.pre is {pre!r}, .* known are .*qwen2, .*; give"):
        gguf_tokenizer.load(byte_level(pre))


def test_a_file_without_a_rule_gets_the_default_and_a_warning():
    with pytest.warns(UserWarning, match="no tokenizer.ggml.pre, .* convert the model again"):
        tokenizer = gguf_tokenizer.load(byte_level(None, ["1 2", "12 3"], more=[("\u01201", 1)]))
    assert tokenizer.tokenize("a 123") == ["a", "\u0120", "123"]

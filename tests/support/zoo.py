"""Small tokenizers of every make, trained here on a little text: name -> transformers tokenizer.

Each has the template CHAT. Their alphabets hold every character of PIECES, so none of it is unknown.
"""

import functools
import json

from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

# What texts are made of: words, spaces and line ends, digits, marks, composed and decomposed letters, other scripts
PIECES = [
    "yes",
    "no",
    "Topic",
    "hello",
    "lo",
    "un",
    "wanted",
    "a",
    "B",
    " ",
    "  ",
    "\n",
    "\n\n",
    " \n",
    "\t",
    "7",
    "2024",
    " 31",
    ":",
    ": ",
    ".",
    "?!",
    "-",
    "'s",
    "é",
    "e\u0301",
    "ß",
    "ﬁ",
    "日本",
    "語",
    "Ж",
    "مر",
    "\U0001f600",
    "\U0001f469\u200d\U0001f680",
    "\u00a0",
    " yes",
    " no",
    " hello",
    "</a>",
]
SPECIAL = ["<unk>", "<s>", "</s>"]
CHAT = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)
LINES = [
    "".join(
        PIECES[i % len(PIECES)] + PIECES[i * 7 % len(PIECES)] + PIECES[(i * i + 3) % len(PIECES)] + " "
        for i in range(start, start + 12)
    )
    for start in range(0, 120, 3)
] + ["Topic: yes\nTopic: no\nhello, the unwanted user said: no", "assistant: yes user: no system: hello"] * 4


def _train(model, trainer, normalizer=None, pre=None, decoder=None, special=SPECIAL, size=420, **options):
    tokenizer = Tokenizer(model)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre is not None:
        tokenizer.pre_tokenizer = pre
    if decoder is not None:
        tokenizer.decoder = decoder
    tokenizer.train_from_iterator(
        LINES, trainer(vocab_size=size, special_tokens=special, show_progress=False, **options)
    )
    return tokenizer


def _finish(tokenizer, front=(), back=(), before=None, **named):
    """The transformers tokenizer, with special tokens around a text."""
    steps = [] if before is None else [before]
    if front or back:
        ids = [(token, tokenizer.token_to_id(token)) for token in {*front, *back}]
        steps.append(processors.TemplateProcessing(single=" ".join([*front, "$A", *back]), special_tokens=ids))
    if steps:
        tokenizer.post_processor = processors.Sequence(steps)
    named = named or {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHAT, **named)


def _bytes(add_prefix_space, trim_offsets, front=(), normalizer=None, split=None):
    """Byte-level BPE, as GPT-2's; with `split` as tiktoken's; with digits apart as others'."""
    level = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=split is None)
    pre = level if split is None else pre_tokenizers.Sequence([split, level])
    tokenizer = _train(
        models.BPE(),
        trainers.BpeTrainer,
        normalizer,
        pre,
        decoders.ByteLevel(),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    return _finish(
        tokenizer, front, before=processors.ByteLevel(trim_offsets=trim_offsets), bos_token="<s>", eos_token="</s>"
    )


def _sentencepiece(normalizer=None, pre=None, front=("<s>",), back=(), model=None, **options):
    model, trainer = model or (models.BPE(unk_token="<unk>"), trainers.BpeTrainer)
    return _finish(_train(model, trainer, normalizer, pre, decoders.Metaspace(), **options), front, back)


def _llama():
    """Spaces become marks by normalizers; characters without a token become bytes."""
    marks = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    learned = json.loads(_train(models.BPE(unk_token="<unk>"), trainers.BpeTrainer, marks, size=500).to_str())["model"]
    tokens = dict.fromkeys([*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *learned["vocab"]])
    vocab = {token: i for i, token in enumerate(token for token in tokens if token not in ("\U0001f600", "\n", "語"))}
    merges = [tuple(pair) for pair in learned["merges"] if {*pair, "".join(pair)} <= set(vocab)]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = marks
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(SPECIAL)
    return _finish(tokenizer, ["<s>"])


def _wordpiece():
    normal, special = normalizers.BertNormalizer(), ["[UNK]", "[CLS]", "[SEP]", "<s>"]
    pre = pre_tokenizers.BertPreTokenizer()
    learned = _train(models.WordPiece(unk_token="[UNK]"), trainers.WordPieceTrainer, normal, pre, special=special)
    alphabet = sorted(set(normal.normalize_str("".join(PIECES))))
    tokens = dict.fromkeys([*learned.get_vocab(), *alphabet, *(f"##{character}" for character in alphabet)])
    tokenizer = Tokenizer(models.WordPiece({token: i for i, token in enumerate(tokens)}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder = normal, pre, decoders.WordPiece()
    tokenizer.add_special_tokens(special)
    return _finish(tokenizer, ["[CLS]"], ["[SEP]"], unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")


def _tiktoken():
    words = r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    return _bytes(False, True, ["<s>"], split=pre_tokenizers.Split(Regex(words), "isolated"))


class Slow(PreTrainedTokenizer):
    """A tokenizer in Python: spaces become marks, one more in front; then the longest token that fits, again and
    again."""

    def __init__(self, vocab, **options):
        self.vocab = vocab
        super().__init__(**options)

    @property
    def vocab_size(self):
        return len(self.vocab)

    def get_vocab(self):
        return {**self.vocab, **self.added_tokens_encoder}

    def _tokenize(self, text, **_):
        text, tokens = "\u2581" + text.replace(" ", "\u2581"), []
        while text:
            size = next((n for n in range(min(12, len(text)), 0, -1) if text[:n] in self.vocab), 1)
            tokens.append(text[:size])
            text = text[size:]
        return tokens

    def _convert_token_to_id(self, token):
        return self.vocab.get(token, self.vocab["<unk>"])

    def _convert_id_to_token(self, index):
        return list(self.vocab)[index]

    def convert_tokens_to_string(self, tokens):
        return "".join(tokens).replace("\u2581", " ")

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None):
        return token_ids_0 if self.bos_token_id is None else [self.bos_token_id, *token_ids_0]


def _slow():
    words = [
        *SPECIAL,
        *dict.fromkeys("".join([*PIECES, *LINES, "\u2581"])),
        "yes",
        "\u2581yes",
        "no",
        "\u2581no",
        "\u2581hel",
        "hello",
        "\u2581\u2581",
        ":\u2581",
        "wanted",
        "\n\n",
        "202",
        "31",
    ]
    return Slow(
        {word: i for i, word in enumerate(dict.fromkeys(words))},
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=CHAT,
    )


_UNIGRAM = (models.Unigram(), trainers.UnigramTrainer)
MAKES = {
    "bytes": lambda: _bytes(False, True),
    "bytes-untrimmed": lambda: _bytes(False, False, ["<s>"]),
    "bytes-prefix": lambda: _bytes(True, False),
    "bytes-prefix-trimmed": lambda: _bytes(True, True, ["<s>"]),
    "bytes-digits-nfc": lambda: _bytes(
        False, True, normalizer=normalizers.NFC(), split=pre_tokenizers.Digits(individual_digits=True)
    ),
    "tiktoken": _tiktoken,
    "llama": _llama,
    "metaspace-first": lambda: _sentencepiece(pre=pre_tokenizers.Metaspace(prepend_scheme="first", split=False)),
    "metaspace-always": lambda: _sentencepiece(pre=pre_tokenizers.Metaspace(prepend_scheme="always")),
    "metaspace-never": lambda: _sentencepiece(pre=pre_tokenizers.Metaspace(prepend_scheme="never")),
    "adds-eos": lambda: _sentencepiece(pre=pre_tokenizers.Metaspace(prepend_scheme="first"), back=["</s>"]),
    "unigram": lambda: _sentencepiece(
        normalizers.NFKC(),
        pre_tokenizers.Metaspace(split=False),
        front=(),
        back=["</s>"],
        model=_UNIGRAM,
        unk_token="<unk>",
    ),
    "wordpiece": _wordpiece,
    "slow": _slow,
}


@functools.cache
def make(name):
    return MAKES[name]()

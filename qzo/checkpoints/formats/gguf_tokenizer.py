"""The tokenizer that a GGUF file carries: the tokens that llama.cpp makes of a text, made by `tokenizers`.

transformers' own path (`gguf_file=`) splits words as GPT-2 does for most values of tokenizer.ggml.pre, and reads
neither add_space_prefix nor wrong metadata; all is built here.

    tokenizer.ggml.model   algorithm
    gpt2                   BPE by the file's merges over bytes, or over text (see gguf_words.Rule)
    gemma4                 BPE by the file's merges over text
    llama                  SentencePiece's BPE: the two neighbours whose token has the highest score merge first

Others (bert, t5, rwkv, plamo2, ...) belong to architectures that gguf_models.py does not list; they are refused.
"""

import math
import warnings
from collections.abc import Callable
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from . import gguf_words
from .gguf_file import GGUFFile
from .gguf_vocabulary import CONTROL, UNKNOWN, USER_DEFINED, Vocabulary, entries, flag, key, read

_BLANK = "\u2581"
_SPM_IDS = {"unknown": 0, "bos": 1, "eos": 2}  # where a SentencePiece file names none, as llama.cpp has it
_SPECIAL = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}


def present(file: GGUFFile) -> bool:
    """Whether the GGUFFile carries a tokenizer."""
    return key("tokens") in file.metadata


def load(file: GGUFFile) -> PreTrainedTokenizerFast:
    """A transformers tokenizer from a GGUFFile.

    ValueError where the file holds none, one of a kind or with a word rule that is not known here, or metadata that
    are missing, damaged or contradictory; the message names the key.
    """
    if not present(file):
        raise ValueError(
            f"{file.path} holds no tokenizer (no {key('tokens')}); load the original "
            "model's with transformers.AutoTokenizer"
        )
    kind = file.metadata.get(key("model"))
    if kind not in ("gpt2", "gemma4", "llama"):
        raise ValueError(
            f"{file.path}: {key('model')} is {kind!r:.60}; those that can be read are gemma4, gpt2 and "
            "llama; give a folder with the original model and its tokenizer"
        )
    vocabulary = read(file)
    if kind == "llama":
        return _sentencepiece(file, vocabulary)
    return _merged(file, vocabulary, _rule(file, kind))


def _rule(file: GGUFFile, kind: str) -> gguf_words.Rule:
    name = "gemma4" if kind == "gemma4" else file.metadata.get(key("pre"), "")
    if name == "":
        warnings.warn(
            f"{file.path}: no {key('pre')}, which tells how words are split; they are split by llama.cpp's "
            "default, which may not be the model's way: convert the model again",
            stacklevel=3,
        )
    return gguf_words.rule_of("default" if name == "" else name, file.path)


# ------------------------------------------------------------------------------------------------ the three algorithms


def _merged(file: GGUFFile, vocabulary: Vocabulary, rule: gguf_words.Rule) -> PreTrainedTokenizerFast:
    merges = _merges(file, vocabulary.tokens)
    splits: list[Any] = [pre_tokenizers.Split(Regex(regex), "isolated") for regex in rule.regexes]
    if rule.byte_level:
        model = models.BPE(_places(vocabulary), merges, ignore_merges=rule.whole_words)
        decoder: Any = decoders.ByteLevel()
        normalizer: Any = normalizers.NFC() if rule.nfc else None
        splits.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    else:
        model = _text_model(vocabulary, merges)
        decoder, normalizer = _text_decoder(False), normalizers.Replace(" ", _BLANK)
    bos = flag(file, "add_bos_token", rule.add_bos) or (rule.add_bos and not rule.byte_level)  # Gemma 4's always
    return _finish(file, vocabulary, model, normalizer, pre_tokenizers.Sequence(splits), decoder, bos)


def _sentencepiece(file: GGUFFile, vocabulary: Vocabulary) -> PreTrainedTokenizerFast:
    gemma = str(file.metadata.get("general.architecture")).startswith("gemma")
    prefix = flag(file, "add_space_prefix", not gemma)
    for role, index in _SPM_IDS.items():
        silent = key(f"{role}_token_id") not in file.metadata
        if silent and index < len(vocabulary.tokens) and vocabulary.types[index] in (UNKNOWN, CONTROL):
            vocabulary.ids[role] = index
    escape = [normalizers.Replace(" ", _BLANK)]
    normalizer = normalizers.Sequence([normalizers.Prepend(_BLANK), *escape] if prefix else escape)
    model = _text_model(vocabulary, _pairs(file, vocabulary.tokens))
    return _finish(file, vocabulary, model, normalizer, None, _text_decoder(prefix), flag(file, "add_bos_token", True))


def _finish(
    file: GGUFFile, vocabulary: Vocabulary, model: Any, normalizer: Any, pre_tokenizer: Any, decoder: Any, bos: bool
) -> PreTrainedTokenizerFast:

    tokenizer = Tokenizer(model)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoder
    stripped = _stripped(file)
    special = [
        AddedToken(token, special=True, normalized=False, rstrip=stripped(token))
        for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True)
        if kind in (CONTROL, UNKNOWN)
    ]
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(
        [
            AddedToken(token, normalized=False, rstrip=stripped(token))
            for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True)
            if kind == USER_DEFINED
        ]
    )
    named = {
        _SPECIAL[role]: AddedToken(vocabulary.tokens[index], special=True, normalized=False)
        for role, index in vocabulary.ids.items()
    }
    _frame(file, tokenizer, vocabulary, bos)
    template = file.metadata.get("tokenizer.chat_template")
    if not isinstance(template, str | None):
        raise ValueError(f"{file.path}: tokenizer.chat_template is {template!r:.60}; it has to be a string")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **named)


def _frame(file: GGUFFile, tokenizer: Tokenizer, vocabulary: Vocabulary, bos: bool) -> None:
    """BOS before and EOS behind every text, where the file asks for it."""
    asked = {"bos": bos, "eos": flag(file, "add_eos_token", False)}
    for role in asked:
        if asked[role] and role not in vocabulary.ids:
            if key(f"add_{role}_token") in file.metadata:
                raise ValueError(
                    f"{file.path}: {key(f'add_{role}_token')} is true, and {key(f'{role}_token_id')} "
                    "names no token; convert the model again"
                )
            asked[role] = False
    if not any(asked.values()):
        return
    single = [*(["bos"] if asked["bos"] else []), "$A", *(["eos"] if asked["eos"] else [])]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single,
        pair=single + [part.replace("$A", "$B") for part in single],
        special_tokens=[
            {"id": role, "ids": [vocabulary.ids[role]], "tokens": [vocabulary.tokens[vocabulary.ids[role]]]}
            for role in asked
            if asked[role]
        ],
    )


# ---------------------------------------------------------------------------------------------------------------- parts


def _places(vocabulary: Vocabulary) -> dict[str, int]:
    return {token: i for i, token in enumerate(vocabulary.tokens)}


def _text_model(vocabulary: Vocabulary, merges: list[tuple[str, str]]) -> Any:
    unknown = vocabulary.ids.get("unknown")
    return models.BPE(
        _places(vocabulary),
        merges,
        byte_fallback=True,
        fuse_unk=True,
        unk_token=None if unknown is None else vocabulary.tokens[unknown],
    )


def _text_decoder(prefix: bool) -> Any:
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    return decoders.Sequence([decoders.Replace(_BLANK, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])


def _merges(file: GGUFFile, tokens: list[str]) -> list[tuple[str, str]]:
    """[(left, right)], the earliest first. ValueError for one that does not make a token of two."""
    merges: dict[Any, Any] = {}
    known = set(tokens)
    for i, merge in enumerate(entries(file, "merges", (str,))):
        place = merge.find(" ", 1)
        left, right = merge[:place], merge[place + 1 :]
        if place < 0 or left not in known or right not in known or left + right not in known:
            raise ValueError(
                f"{file.path}: {key('merges')} holds {merge!r:.60} as {i}, which is not two tokens that "
                "make a third; convert the model again"
            )
        merges[left, right] = None  # one that is there twice keeps its first place
    return list(merges)


def _pairs(file: GGUFFile, tokens: list[str]) -> list[tuple[str, str]]:
    """[(left, right)] for every way to make a token of two, the highest score first.

    SentencePiece looks the sum up and knows no merges. Among equal scores it takes the leftmost pair; here the lower id
    goes first, which is the same for runs of blanks, to whose tokens real files give one score.
    """
    scores = entries(file, "scores", (float, int), len(tokens))
    if any(math.isnan(score) for score in scores):
        raise ValueError(f"{file.path}: {key('scores')} holds NaN; convert the model again")
    known = set(tokens)
    order = sorted(range(len(tokens)), key=lambda i: -scores[i])
    return [
        (tokens[i][:cut], tokens[i][cut:])
        for i in order
        for cut in range(1, len(tokens[i]))
        if tokens[i][:cut] in known and tokens[i][cut:] in known
    ]


def _stripped(file: GGUFFile) -> Callable[[str], bool]:
    """Whether blanks behind a special token are part of it: Phi-3's, which llama.cpp tells by the model's name."""
    phi3 = any(part in str(file.metadata.get("general.name")).lower() for part in ("phi-3", "phi3"))
    return lambda token: phi3 and token not in ("<unk>", "<s>", "<|endoftext|>")

"""What a GGUF file says of its vocabulary, checked as llama.cpp checks it (src/llama-vocab.cpp)."""

import dataclasses
import math
import warnings
from typing import Any

from .gguf_file import GGUFFile

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
ROLES = ("bos", "eos", "unknown", "padding")
_NO_TOKEN = (-1, 2**32 - 1)  # how converters write that there is none
# what some converters left normal, and llama.cpp takes for control tokens by their text
_CONTROL_TEXTS = """
<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> <|endoftext|> </s> <|eom_id|> <EOT>
_<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance> <eos> <turn|> <|tool_response> <｜end▁of▁sentence｜> [e~[
<|fim_prefix|> <fim-prefix> <fim_prefix> <｜fim▁begin｜> <PRE> ▁<PRE> <|code_prefix|> <|prefix|>
<|fim_suffix|> <fim-suffix> <fim_suffix> <｜fim▁hole｜> <SUF> ▁<SUF> <|code_suffix|> <|suffix|>
<|fim_middle|> <fim-middle> <fim_middle> <｜fim▁end｜> <MID> ▁<MID> <|code_middle|> <|middle|>
<|fim_pad|> <fim-pad> <fim_pad> <PAD> [PAD] <|fim_repo|> <|repo_name|> <fim-repo> <REPO> <reponame> <|file_sep|>
"""
_CONTROL = frozenset(_CONTROL_TEXTS.split())
_WHOLE = frozenset(("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"))  # taken for user-defined ones


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """tokens : all different; a token's id is its place
    types : NORMAL, CONTROL, ... of each token
    ids : a role of ROLES -> the token id; a role whose token the file lacks is missing
    """

    tokens: list
    types: list
    ids: dict


def key(name: str) -> str:
    return f"tokenizer.ggml.{name}"


def read(file: GGUFFile) -> Vocabulary:
    """The Vocabulary of a GGUFFile. ValueError naming the metadata that is missing, damaged or contradictory."""
    tokens = entries(file, "tokens", (str,))
    if not tokens:
        raise ValueError(f"{file.path}: {key('tokens')} is empty; convert the model again")
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]
    known = set(tokens)
    if len(known) < len(tokens):
        places = {token: i for i, token in enumerate(tokens)}
        first = next(i for i, token in enumerate(tokens) if places[token] != i)
        raise ValueError(
            f"{file.path}: {key('tokens')} holds {tokens[first]!r:.60} twice, as {first} and "
            f"{places[tokens[first]]}; convert the model again"
        )
    rows = _rows(file)
    if rows is not None and len(tokens) > rows:
        raise ValueError(
            f"{file.path}: {key('tokens')} has {len(tokens)} entries, token_embd.weight {rows} rows; the "
            "file is damaged, fetch it again"
        )
    types = [NORMAL] * len(tokens)
    if key("token_type") in file.metadata:
        types = entries(file, "token_type", (int,), len(tokens))
    types = [
        USER_DEFINED if token in _WHOLE else CONTROL if token in _CONTROL else kind
        for token, kind in zip(tokens, types, strict=True)
    ]
    return Vocabulary(tokens, types, token_ids(file, warn=True))


def entries(file: GGUFFile, name: str, kinds: tuple[type, ...], count: int | None = None) -> list[Any]:
    """The list under tokenizer.ggml.<name>. ValueError unless it has `count` entries of these types."""
    found = file.metadata.get(key(name))
    if found is None:
        raise ValueError(f"{file.path}: no {key(name)}, which its tokenizer needs; convert the model again")
    if not isinstance(found, list) or any(type(entry) not in kinds for entry in found):
        raise ValueError(
            f"{file.path}: {key(name)} is {found!r:.60}; it has to be a list of "
            f"{' or '.join(kind.__name__ for kind in kinds)}"
        )
    if count is not None and len(found) != count:
        raise ValueError(
            f"{file.path}: {key(name)} has {len(found)} entries for {count} tokens; convert the model again"
        )
    return found


def flag(file: GGUFFile, name: str, default: bool) -> bool:
    """A truth value under tokenizer.ggml.<name>. ValueError for anything else."""
    found = file.metadata.get(key(name), default)
    if not isinstance(found, bool):
        raise ValueError(f"{file.path}: {key(name)} is {found!r:.60}; it has to be true or false")
    return found


def token_ids(file: GGUFFile, warn: bool = False) -> dict[str, int]:
    """Role -> token id, for each of ROLES whose id is that of a token; others are left out.

    ValueError for an id that is no whole number.
    """
    found, limits = {}, [count for count in (_count(file), _rows(file)) if count is not None]
    for role in ROLES:
        index = file.metadata.get(key(f"{role}_token_id"))
        if index is None:
            continue
        if type(index) is not int:
            raise ValueError(f"{file.path}: {key(f'{role}_token_id')} is {index!r:.60}; it has to be a whole number")
        if 0 <= index < min(limits, default=math.inf):
            found[role] = index
        elif warn and index not in _NO_TOKEN:
            warnings.warn(
                f"{file.path}: {key(f'{role}_token_id')} is {index}, and there are {min(limits)} tokens; it "
                "is left out",
                stacklevel=2,
            )
    return found


def _count(file: GGUFFile) -> int | None:
    tokens = file.metadata.get(key("tokens"))
    return len(tokens) if isinstance(tokens, list) else None


def _rows(file: GGUFFile) -> int | None:
    info = file.tensors.get("token_embd.weight")
    return None if info is None else info.shape[0]

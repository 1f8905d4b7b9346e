"""The tokenizer that a checkpoint brings along."""

import hashlib
import json
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .formats import gguf_tokenizer
from .formats.gguf_file import GGUFFile
from .formats.reading import reading
from .source import locate


def load_tokenizer(path_or_id: str | Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, GGUF file or Hub id, with its chat template.

    Parameters
    ----------
    path_or_id
        As in `qzo.from_pretrained`.
    trust_remote_code
        Whether code that the folder brings along is run.

    Raises
    ------
    ValueError
        If there is none, or it cannot be read.
    """
    path = locate(path_or_id)
    if path.is_file():
        return gguf_tokenizer.load(GGUFFile(path))
    with reading(path, "its tokenizer cannot be read"):
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """A text that differs where two tokenizers make other tokens of a text or a chat: by their rules, as far as these
    are known (a fast one's), their vocabulary, special tokens and chat template."""
    rules = getattr(tokenizer, "backend_tokenizer", None)
    kept = [rules.to_str() if rules else type(tokenizer).__name__, tokenizer.get_vocab(), tokenizer.chat_template]
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    text = json.dumps([*kept, special], sort_keys=True)
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"

"""The tokenizer that a GGUF file carries.

transformers' own path (`gguf_file=`) takes several seconds, mostly to parse the header. A byte-level BPE
whose words are split as GPT-2's is built here from the tokens and merges; every other kind is left to
transformers.
"""
_GPT2_SPLITS = ("smollm", "gpt-2", "gpt2", "default")
_CONTROL, _USER_DEFINED = 3, 4


def present(file):
    """Whether the GGUFFile carries a tokenizer."""
    return "tokenizer.ggml.tokens" in file.metadata


def load(file):
    """A transformers tokenizer from a GGUFFile. ValueError where the file holds none."""
    meta = file.metadata
    if not present(file):
        raise ValueError(f"{file.path} holds no tokenizer (no tokenizer.ggml.tokens); load the original "
                         "model's with transformers.AutoTokenizer")
    gpt2 = meta.get("tokenizer.ggml.model") == "gpt2"
    splits = meta.get("tokenizer.ggml.pre", "default") in _GPT2_SPLITS
    adds = meta.get("tokenizer.ggml.add_bos_token") or meta.get("tokenizer.ggml.add_eos_token")
    if gpt2 and splits and not adds:
        return _byte_level(meta)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(file.path.parent, gguf_file=file.path.name)


def _byte_level(meta):
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = meta["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    kinds = meta.get("tokenizer.ggml.token_type", [])
    special = [AddedToken(token, special=True, normalized=False)
               for token, kind in zip(tokens, kinds, strict=False) if kind == _CONTROL]
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens([AddedToken(token, normalized=False)
                          for token, kind in zip(tokens, kinds, strict=False) if kind == _USER_DEFINED])
    named = {}
    for role in ("bos", "eos", "unknown", "padding"):
        index = meta.get(f"tokenizer.ggml.{role}_token_id")
        if index is not None:
            named[{"unknown": "unk", "padding": "pad"}.get(role, role) + "_token"] = tokens[index]
    template = meta.get("tokenizer.chat_template")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **named)

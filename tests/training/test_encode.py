"""The tokens of a line are those of its whole text, and the labels lie on the completion: for tokenizers of every make,
over generated texts."""

import functools
import random
import unicodedata
import warnings

import pytest
from tokenizers import decoders
from transformers.convert_slow_tokenizer import bytes_to_unicode

from qzo.training.data import IGNORED, tokenize
from tests.support import zoo

BYTE = {character: byte for byte, character in bytes_to_unicode().items()}
EVERY = pytest.mark.parametrize("name", zoo.MAKES)


@functools.cache
def pairs():
    """(prompt, completion), each of a few pieces."""
    rng = random.Random(0)
    return [tuple("".join(rng.choices(zoo.PIECES, k=rng.randint(1, most))) for most in (7, 4)) for _ in range(150)]


def bare(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def said(tokenizer, ids):
    """What tokens say: their own text with spaces for marks, decomposed; of a tokenizer that drops spaces, without."""
    out = b""
    for token in tokenizer.convert_ids_to_tokens(ids):
        if isinstance(getattr(tokenizer, "decoder", None), decoders.ByteLevel):
            out += bytes(BYTE[character] for character in token)
        elif token.startswith("<0x"):
            out += bytes([int(token[3:5], 16)])
        else:
            out += token.removeprefix("##").replace("\u2581", " ").encode()
    return unicodedata.normalize("NFKD", out.decode(errors="replace"))


def spelled(tokenizer, text):
    """A text as `said` gives it."""
    if tokenizer.cls_token is not None:
        text = "".join(tokenizer.backend_tokenizer.normalizer.normalize_str(text).split())
    return unicodedata.normalize("NFKD", text)


def covers(tokenizer, ids, text):
    """Whether tokens hold the text, and no token more than it needs."""
    want = spelled(tokenizer, text)
    return said(tokenizer, ids).endswith(want) and not said(tokenizer, ids[1:]).endswith(want)


def quietly(records, tokenizer, **options):
    """(examples, what was warned of)."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        return tokenize(records, tokenizer, **options), [str(w.message) for w in seen]


def ending(tokenizer):
    """What closes a completion: what the tokenizer closes a text with, and one EOS."""
    count = len(tokenizer("a")["input_ids"]) - len(bare(tokenizer, "a")) - len(opening(tokenizer))
    back = tokenizer("a")["input_ids"][-count:] if count else []
    return back if tokenizer.eos_token_id in (None, *back) else [*back, tokenizer.eos_token_id]


def opening(tokenizer):
    return [t for t in tokenizer("a")["input_ids"][:1] if t in (tokenizer.bos_token_id, tokenizer.cls_token_id)]


@EVERY
def test_prompt_and_completion_are_the_tokens_of_the_whole_text(name):
    tokenizer, crossed, exact = zoo.make(name), 0, 0
    for prompt, completion in pairs():
        record = {"prompt": prompt, "completion": completion}
        whole = opening(tokenizer) + bare(tokenizer, prompt + completion)
        none = "has no tokens" if bare(tokenizer, prompt) == bare(tokenizer, prompt + completion) else "are one token"
        if none == "has no tokens" or len(whole) == 1:
            with pytest.raises(ValueError, match=f"example 1: .* completion .*{none}"):
                tokenize([record], tokenizer)
            continue
        [example], warned = quietly([record], tokenizer)
        close = ending(tokenizer)
        assert list(example.ids) == whole + close
        count = len(example.ids) - example.labels.count(IGNORED)
        assert example.labels == (IGNORED,) * (len(example.ids) - count) + example.ids[-count:]
        own = example.ids[-count : len(example.ids) - len(close)]
        assert covers(tokenizer, own, completion), (prompt, completion, tokenizer.convert_ids_to_tokens(own))
        over = len(said(tokenizer, own)) > len(spelled(tokenizer, completion))
        assert len(warned) == over
        crossed, exact = crossed + over, exact + (not over)
    assert exact > 60
    assert crossed > 0 or name == "metaspace-never"


@EVERY
def test_options_are_the_tokens_of_the_whole_text(name):
    tokenizer = zoo.make(name)
    for number, (prompt, _) in enumerate(pairs()):
        prompt = f"yes no{prompt}"
        options = [pairs()[(number + k) % len(pairs())][1] + end for k, end in enumerate((" yes", "no", "7"))]
        [example], _ = quietly([{"prompt": prompt, "options": options, "label": 1}], tokenizer)
        apart = [quietly([{"prompt": prompt, "completion": option}], tokenizer)[0][0] for option in options]
        wholes = [opening(tokenizer) + bare(tokenizer, prompt + option) for option in options]
        assert [[*example.ids, *ids] for ids in example.options] == wholes
        most = min(one.labels.count(IGNORED) for one in apart)
        same = next((n for n in range(most) if len({whole[n] for whole in wholes}) > 1), most)
        assert len(example.ids) == same


@EVERY
def test_texts_and_messages_are_as_the_tokenizer_gives_them(name):
    tokenizer = zoo.make(name)
    for prompt, completion in pairs():
        text = "yes no" + prompt
        [example], warned = quietly([{"text": text}], tokenizer)
        assert list(example.ids) == opening(tokenizer) + bare(tokenizer, text) + ending(tokenizer)
        assert example.labels == example.ids
        [example], warned = quietly([{"text": text}], tokenizer, text_eos=False)
        assert list(example.ids) == tokenizer(text)["input_ids"]
        assert example.labels == example.ids
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion + "a"}]
        [example], _ = quietly([{"messages": messages}], tokenizer)
        assert list(example.ids) == tokenizer.apply_chat_template(messages)["input_ids"]
        own = example.ids[example.labels.count(IGNORED) :]
        assert example.labels[-len(own) :] == own
        assert covers(tokenizer, own, f" {completion}a\n")
        assert not warned


@EVERY
def test_all_turns_of_the_assistant_are_its_text_and_no_more(name):
    tokenizer = zoo.make(name)
    for prompt, completion in pairs()[:60]:
        said_by = [f"{completion}a", f"no{completion}7", f"yes {prompt}"]
        turns = [
            {"role": role, "content": content}
            for answer in said_by
            for role, content in (("user", f"{prompt}."), ("assistant", answer))
        ]
        [last], _ = quietly([{"messages": turns}], tokenizer)
        [example], warned = quietly([{"messages": turns}], tokenizer, chat_loss="all")
        assert example.ids == last.ids
        stretches: list[list[int]] = []
        labels = list(example.labels)
        for number, label in enumerate(labels):
            if label != IGNORED:
                stretches += [[]] if number == 0 or labels[number - 1] == IGNORED else []
                stretches[-1].append(label)
                assert label == example.ids[number]
        assert len(stretches) == 3
        over = False
        for stretch, answer in zip(stretches, said_by, strict=True):
            assert covers(tokenizer, stretch, f" {answer}\n"), (answer, tokenizer.convert_ids_to_tokens(stretch))
            over = over or len(said(tokenizer, stretch)) > len(spelled(tokenizer, f" {answer}\n"))
        assert len(warned) == over


@EVERY
def test_a_prompt_cut_from_the_left_keeps_what_stands_in_front(name):
    tokenizer = zoo.make(name)
    front = opening(tokenizer)
    for prompt, completion in pairs()[:40]:
        record = {"prompt": "yes no hello" * 3 + prompt + ":", "completion": f"a{completion}"}
        choice = {"prompt": record["prompt"], "options": [f"{k}{completion}" for k in "aB"], "label": 0}
        [whole, options], _ = quietly([record], tokenizer)[0] + quietly([choice], tokenizer)[0], None
        count = whole.labels.count(IGNORED)
        limit = len(whole.ids) - 4
        [cut], warned = quietly([record], tokenizer, max_length=limit)
        assert list(cut.ids) == front + list(whole.ids[len(front) + 4 :])
        assert cut.labels == (IGNORED,) * (count - 4) + whole.labels[count:]
        longest = len(options.ids) + max(map(len, options.options))
        [cut], more = quietly([choice], tokenizer, max_length=longest - 4)
        assert list(cut.ids) == front + list(options.ids[len(front) + 4 :])
        assert cut.options == options.options
        assert sum("1 of 1 lines have more than" in text for text in warned + more) == 2

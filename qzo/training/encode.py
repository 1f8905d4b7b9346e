"""Text -> tokens: those that a server makes of the whole text, cut where the prompt ends.

A tokenizer gives a text other tokens by itself than behind another: a space mark in front, the beginning of a word for
its middle. So a prompt and what follows it are encoded together and then cut. The cut is found by the tokens' own
text, which every tokenizer can tell, fast or not; offsets leave out spaces, and what normalizers make of a character.

    the prompt's own tokens begin the whole     they are the prompt
    they do not, their text does                the tokens of the whole that have it: the split is another, the cut not
    a token holds text of both sides            it belongs to what follows, and so is learned
    such a token is unknown                     it tells nothing of either: both sides are encoded by themselves, unless
                                                that makes more unknown ones

Of a conversation the last message is learned, or all of the assistant's: the tokens from where the generation prompt
ends to where the turn does, told by rendering the conversation up to either.

The tokenizer's own special tokens (BOS in front, EOS behind) stand once, around the whole, never inside.
"""

from typing import Any

from jinja2 import TemplateError

from .chats import written

# What rendering a template raises: its own complaint, or that of an expression in it
_REFUSALS = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)


CHAT_LOSSES = ("last", "all")


class Refused(ValueError):
    """A chat template that does not render a conversation."""


class Encoder:
    """Token ids, lists of int, of what a line says. text_eos: whether EOS stands behind a text, too; chat_loss: "last"
    or "all", which messages of the assistant are learned.
    front, back: the special tokens that the tokenizer puts around a text, learned from the first text that tells.
    ValueError for half of a surrogate pair, for what has no tokens, for
    a chat template that fails, and for options that are the same tokens."""

    def __init__(self, tokenizer: Any, text_eos: bool = True, chat_loss: str = "last"):
        if chat_loss not in CHAT_LOSSES:
            raise ValueError(f"chat_loss={chat_loss!r}: known are {', '.join(CHAT_LOSSES)}")
        self.tokenizer, self.text_eos, self.chat_loss = tokenizer, text_eos, chat_loss
        self.front: list[int] = []
        self.back: list[int] = []
        self._learned = False
        # name of an argument -> the same of a text for an encoder, for a decoder
        self._beside: dict[str, tuple[list[int], list[int], bool]] = {}

    @property
    def chats(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return getattr(self.tokenizer, "chat_template", None) is not None

    def text(self, text: str) -> tuple[list[int], int]:
        """(ids of a text as the tokenizer gives them and perhaps EOS, how many of them come before what it puts
        behind). EOS stands there once, as behind a completion."""
        bare = self._bare(text)
        if not bare:
            raise ValueError(f"the text {text!r} has no tokens")
        ids = _joined(self.front, bare)
        return (self._closed(ids) if self.text_eos else _joined(ids, self.back)), len(ids)

    def completion(self, prompt: str, completion: str) -> tuple[list[int], list[int], int, bool]:
        """(ids of the prompt, of the completion, how many of these are its own, whether a token spanned the cut).

        Behind its own stands what the tokenizer puts behind a text, and EOS unless that or the completion has it.
        """
        prompt, [own], spans = self._split(prompt, [completion])
        if not own:
            raise ValueError(
                f"the completion {completion!r} has no tokens; one that ends at once is the EOS token's text"
            )
        whole = _joined(self.front, prompt + own)
        return whole[: len(whole) - len(own)], self._closed(own), len(own), spans

    def options(self, prompt: str, options: list[str]) -> tuple[list[int], list[list[int]], bool]:
        """(ids of the prompt, which all options share, of each option, whether a token spanned a cut). The text goes
        on behind an option, so no EOS is put there."""
        shared, ids, spans = self._split(prompt, options)
        numbers: dict[tuple[int, ...], int] = {}
        for number, own in enumerate(map(tuple, ids)):
            if not own:
                raise ValueError(f"the option {options[number]!r} has no tokens")
            if own in numbers:
                raise ValueError(
                    f"the options {options[numbers[own]]!r} and {options[number]!r} are the same tokens: "
                    "there is nothing to choose"
                )
            numbers[own] = number
        shared = _joined(self.front, shared)
        if not shared:
            raise ValueError("no token of the prompt stands before its options: there is nothing to choose by")
        return shared, ids, spans

    def both(self, source: str, target: str, most: int) -> tuple[list[int], list[int], int]:
        """(ids of a text for an encoder, at most `most`, of that for its decoder, how many tokens the first has): each
        as the tokenizer gives them by themselves, what it puts around a text once; EOS behind the second, unless it
        puts that there itself (mBART's stands before a language). ValueError for `most` that leaves no text."""
        ids, front, back = self._alone(source, "text")
        labels, _, behind = self._alone(target, "text_target")
        if self._eos is not None and self._eos != labels[-1] and self._eos not in behind:
            labels.append(self._eos)
        room = most - len(front) - len(back)
        if room < 1:
            raise ValueError(
                f"max_length={most} leaves no token of the prompt beside the {len(front) + len(back)} "
                "that the tokenizer puts around it"
            )
        inner = ids[len(front) : len(ids) - len(back)]
        return [*front, *inner[:room], *back], labels, len(ids)

    def chat(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None
    ) -> tuple[list[int], list[int], list[bool], bool]:
        """(ids of the conversation up to the last message's content, of the rest, which of the first are learned,
        whether a token spanned a cut). What the template renders, of the tools too, is whole: nothing is put around it.
        A template that refuses the arguments of calls as objects is given their JSON text."""
        try:
            whole = self._rendered(messages, tools=tools)
        except Refused:
            as_text = written(messages)
            if as_text is None:
                raise
            messages, whole = as_text, self._rendered(as_text, tools=tools)
        before = self._rendered(messages[:-1], tools=tools, add_generation_prompt=True)
        if not whole.startswith(before):
            raise ValueError("the chat template does not continue its own generation prompt: use prompt and completion")
        prompt, [own], spans = self._split(before, [whole[len(before) :]])
        if not own:
            raise ValueError(f"the chat template gives the last message, {messages[-1].get('content')!r}, no tokens")
        learned = [False] * len(prompt)
        for number, message in enumerate(messages[:-1] if self.chat_loss == "all" else ()):
            if number and message["role"] == "assistant":  # what begins a conversation answers nothing
                start, end, over = self._turn(messages, number, tools, whole, prompt + own)
                learned[start:end] = [True] * (min(end, len(prompt)) - start)
                spans = spans or over
        return prompt, own, learned, spans

    def _turn(self, messages, number, tools, whole, ids):
        """(the first token of a turn of the assistant, the first behind it, whether a token spans its beginning) among
        the ids of the whole conversation."""
        before = self._rendered(messages[:number], tools=tools, add_generation_prompt=True)
        through = self._rendered(messages[: number + 1], tools=tools)
        if not (through.startswith(before) and whole.startswith(through)):
            raise ValueError(
                f"the chat template renders messages[{number}] otherwise when others follow it, so what would be "
                "learned is not what a server asks for: give --chat-loss last, or a line for each turn of the assistant"
            )
        start, over = self._cut(before, self._bare(before), whole[len(before) :], ids)
        end, _ = self._cut(through, self._bare(through), whole[len(through) :], ids)
        return start, end, over

    def fitted(self, prompt: list[int], room: int) -> list[int] | None:
        """Which places of the prompt's ids are kept, at most `room`: special tokens in front stay, what follows them
        loses its beginning. None where nothing else would be left."""
        if len(prompt) <= room:
            return list(range(len(prompt)))
        kept = next((n for n in range(len(self.front), 0, -1) if prompt[:n] == self.front[-n:]), 0)
        kept = max(kept, int(prompt[:1] == [self.tokenizer.bos_token_id]))
        return [*range(kept), *range(len(prompt) + kept - room, len(prompt))] if room > kept else None

    def prompt(self, text: str) -> list[int]:
        """Ids of a text that a model is to continue: what the tokenizer puts in front of it, nothing behind."""
        bare = self._bare(text)
        if not bare:
            raise ValueError(f"the prompt {text!r} has no tokens")
        return _joined(self.front, bare)

    def source(self, text: str) -> list[int]:
        """Ids of a text for the encoder of an encoder-decoder model, as `both` has it, whole."""
        return self._alone(text, "text")[0]

    def asked(self, messages: list[dict[str, Any]]) -> str:
        """The text of messages that the model is to answer. Its ids are `rendered`'s: all that the template renders."""
        return self._rendered(messages, add_generation_prompt=True)

    def rendered(self, text: str) -> list[int]:
        """Ids of what the template has rendered: nothing is put around it."""
        return self._bare(text)

    def turn_end(self) -> int | None:
        """The special token that the chat template puts right behind an answer; None where there is none."""
        answer = "Yes."
        if not self.chats:
            return None
        try:
            whole = self._rendered([{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": answer}])
        except Refused:
            return None
        behind = self._bare(whole.rpartition(answer)[2])[:1] if answer in whole else []
        added = self.tokenizer.added_tokens_decoder
        return next((token for token in behind if token in added and added[token].special), None)

    @property
    def _eos(self):
        return self.tokenizer.eos_token_id

    def _closed(self, ids):
        """The ids, what the tokenizer puts behind a text, and EOS unless that or they have it at their end."""
        closed = _joined(ids, self.back)
        return closed if self._eos is None or self._eos in (ids[-1], *self.back) else [*closed, self._eos]

    def _rendered(self, messages, **options):
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, **options)
        except _REFUSALS as error:
            if not self.chats:
                raise ValueError(
                    "the tokenizer has no chat template: put a chat_template.jinja, that of the model's chat version, "
                    "beside its tokenizer_config.json, or give lines of prompt and completion"
                ) from None
            roles = ", ".join(message["role"] for message in messages)
            raise Refused(
                f"the chat template refuses messages of the roles {roles}: {type(error).__name__}: {error}"
            ) from None

    def _bare(self, text):
        """Ids without special tokens, but for those that the text spells."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"a text has half of a surrogate pair, {text[error.start]!a} in "
                f"{text[max(0, error.start - 20) : error.end + 20]!a}: that is no character"
            ) from None
        ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        if ids and not self._learned:
            self._learn(text, ids)
        return ids

    def _learn(self, text, bare):
        self.front, self.back, self._learned = _around(list(self.tokenizer(text)["input_ids"]), bare, text)

    def _alone(self, text, name):
        """(ids of a text by itself, what the tokenizer puts in front, behind). name: its argument, which may be another
        for a target."""
        if not self._bare(text):
            raise ValueError(f"the text {text!r} has no tokens")
        bare = list(self.tokenizer(**{name: text}, add_special_tokens=False)["input_ids"])
        front, back, sure = self._beside.get(name) or _around(
            list(self.tokenizer(**{name: text})["input_ids"]), bare, text
        )
        if sure:
            self._beside[name] = front, back, sure
        return _joined(_joined(front, bare), back), front, back

    def _split(self, prompt, parts):
        """(ids of the prompt, of each part behind it, whether a token spanned a cut): `prompt + part` of each part."""
        own, wholes = self._bare(prompt), [self._bare(prompt + part) for part in parts]
        cuts = [self._cut(prompt, own, part, whole) for part, whole in zip(parts, wholes, strict=True)]
        if any(
            self._tells_nothing(own, part, whole, *cut) for part, whole, cut in zip(parts, wholes, cuts, strict=True)
        ):
            return own, [self._bare(part) for part in parts], False
        count = min(count for count, _ in cuts)
        count = min(_common(wholes[0][:count], whole) for whole in wholes)
        spans = any(spans or shared > count for shared, spans in cuts)
        return wholes[0][:count], [whole[count:] for whole in wholes], spans

    def _cut(self, prompt, own, part, whole):
        """(how many tokens of the whole are the prompt's, whether the next holds text of both sides)."""
        count = _common(own, whole)
        if count == len(own):
            beyond = bool(own) and own[-1] == self.tokenizer.unk_token_id and self._reaches(prompt, part, own, whole)
            return count - beyond, beyond
        text = _units(self.tokenizer, own[count:])
        at = 0
        for token in self.tokenizer.convert_ids_to_tokens(whole[count:]):
            if [*token] != text[at : at + len(token)]:
                break
            at, count = at + len(token), count + 1
        return count, at < len(text)

    def _reaches(self, prompt, part, own, whole):
        """Whether the unknown token that ends the prompt holds text of the part too."""
        if not getattr(self.tokenizer, "is_fast", False):  # no offsets, but what an unknown token was made of
            tokens = self.tokenizer.tokenize(prompt + part)
            return len(whole) == len(own) or tokens[len(own) - 1] != self.tokenizer.tokenize(prompt)[-1]
        offsets = self.tokenizer(prompt + part, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        return offsets[len(own) - 1][1] > len(prompt)

    def _tells_nothing(self, own, part, whole, count, spans):
        """Whether the token that spans the cut is unknown, and both sides by themselves have no more unknown ones."""
        unknown = self.tokenizer.unk_token_id
        if not spans or unknown is None or whole[count : count + 1] != [unknown]:
            return False
        return (own + self._bare(part)).count(unknown) <= whole.count(unknown)


def _around(full, bare, text):
    """(what stands in front of the bare ids in the full ones, behind them, whether there is one such place)."""
    places = [at for at in range(len(full) - len(bare) + 1) if full[at : at + len(bare)] == bare]
    if not places:
        raise ValueError(
            f"the tokenizer splits {text[:40]!r} otherwise when it adds special tokens: which ones it "
            "adds cannot be told"
        )
    return full[: places[0]], full[places[0] + len(bare) :], len(places) == 1  # a text of BOS alone does not tell


def _units(tokenizer, ids):
    """The characters of tokens (bytes, of a tokenizer whose tokens are bytes)."""
    return [unit for token in tokenizer.convert_ids_to_tokens(ids) for unit in token]


def _common(one, other):
    """How many tokens two lists begin with alike."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _joined(one, other):
    """Both lists behind one another; tokens that end the one and begin the other stand once."""
    twice = next((n for n in range(min(len(one), len(other)), 0, -1) if one[-n:] == other[:n]), 0)
    return one + other[twice:]

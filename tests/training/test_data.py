"""From lines to examples: special tokens stand where the text begins and ends, and a line that cannot be learned is
named before anything trains."""

import itertools
import warnings

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from qzo.training.data import IGNORED, Example, batch_indices, tokenize
from qzo.training.records import read_records
from tests.support import tiny, zoo

WORDS = ["<unk>", "<s>", "</s>", "<g>", "a", "b", "c", "yes", "no", "please", "assistant", "user", ":"]
ID = {word: i for i, word in enumerate(WORDS)}
CHAT = (
    "{% for m in messages %}{{ m['role'] + ' : ' + m['content'] + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant : ' }}{% endif %}"
)


def words(around="<s> $A </s>", template=CHAT, eos="</s>"):
    """A tokenizer of whole words, with what `around` says around a text."""
    tokenizer = Tokenizer(models.WordLevel(ID, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<s>", "</s>", "<g>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=around, special_tokens=[(token, ID[token]) for token in around.split() if token != "$A"]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token=eos, unk_token="<unk>", chat_template=template
    )


def ids(text):
    return tuple(ID[word] for word in text.split())


def learned(prompt, completion):
    return Example(ids(prompt) + ids(completion), labels=(IGNORED,) * len(ids(prompt)) + ids(completion))


# ------------------------------------------------------------------------------------------------ special tokens


@pytest.mark.parametrize(
    ("around", "front", "end"),
    [
        ("$A", "", ""),
        ("<s> $A", "<s>", ""),
        ("$A </s>", "", "</s>"),
        ("<s> $A </s>", "<s>", "</s>"),
        ("<g> <s> $A </s>", "<g> <s>", "</s>"),
        ("<g> <s> $A", "<g> <s>", ""),
    ],
)
def test_special_tokens_stand_once_around_the_whole(around, front, end):
    tokenizer = words(around)

    def one(**record):
        return tokenize([record], tokenizer)[0]

    prompt = f"{front} a b"
    assert one(prompt="a b", completion=" yes") == learned(prompt, "yes </s>")
    assert one(prompt="a b ", completion="yes </s>") == learned(prompt, "yes </s>")
    assert one(prompt=prompt, completion=" yes") == learned(prompt, "yes </s>")
    assert one(prompt="<s> a b", completion=" yes") == learned(prompt if front else "<s> a b", "yes </s>")
    assert one(prompt="a </s> b", completion=" yes") == learned(f"{front} a </s> b", "yes </s>")
    assert one(prompt="", completion="yes no") == learned(front, "yes no </s>")
    assert one(prompt="", completion="<s> yes") == learned(front.removesuffix("<s>"), "<s> yes </s>")
    assert one(prompt="a b", completion="</s>") == learned(prompt, "</s>")
    for text in (prompt, "a b"):
        choice = one(prompt=text, options=[" yes", " no please"], label=1)
        assert choice == Example(ids(prompt), options=(ids("yes"), ids("no please")), label=1)
        whole = Example(ids(f"{prompt} </s>"), labels=ids(f"{prompt} </s>"))
        assert one(text=f"{text} </s>") == one(text=text) == whole
        [bare] = tokenize([{"text": text}], tokenizer, text_eos=False)
        assert bare == Example(ids(f"{prompt} {end}"), labels=ids(f"{prompt} {end}"))
    turns = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "yes"}]
    assert one(messages=turns) == learned("user : a b assistant :", "yes")


def test_a_tokenizer_without_eos_ends_a_completion_as_it_ends_a_text():
    record = {"prompt": "a b", "completion": " yes"}
    assert tokenize([record], words("<s> $A", eos=None)) == [learned("<s> a b", "yes")]
    assert tokenize([record], words("<s> $A <g>", eos=None)) == [learned("<s> a b", "yes <g>")]


def test_the_first_line_may_be_special_tokens_alone():
    records = [{"text": "<s> <s>"}, {"text": "<s> </s> a"}, {"text": "a b"}]
    assert [e.ids for e in tokenize(records, words("<s> $A"))] == [
        ids("<s> <s> </s>"),
        ids("<s> </s> a </s>"),
        ids("<s> a b </s>"),
    ]


@pytest.mark.parametrize(
    ("around", "record", "want"),
    [
        ("<s> $A </s>", {"prompt": "a b c a b c", "completion": " yes"}, learned("<s> b c", "yes </s>")),
        ("<g> <s> $A", {"prompt": "a b c a b c", "completion": " yes"}, learned("<g> <s> c", "yes </s>")),
        ("$A", {"prompt": "a b c a b c", "completion": " yes"}, learned("a b c", "yes </s>")),
        ("$A", {"prompt": "<s> a b c a b c", "completion": " yes"}, learned("<s> b c", "yes </s>")),
        ("<s> $A </s>", {"text": "a b c a b c"}, Example(ids("<s> a b c a"), labels=ids("<s> a b c a"))),
        (
            "<s> $A",
            {"prompt": "a b c a b c", "options": [" yes", " no please"], "label": " no please"},
            Example(ids("<s> b c"), options=(ids("yes"), ids("no please")), label=1),
        ),
        (
            "<s> $A",
            {"messages": [{"role": "user", "content": "a b c a b"}, {"role": "assistant", "content": "yes"}]},
            learned("<s> b assistant :", "yes"),
        ),
    ],
)
def test_a_prompt_loses_its_beginning_but_no_special_token(around, record, want):
    tokenizer = words(around, "<s> " + CHAT)
    [whole] = tokenize([record], tokenizer)
    longest = len(whole.ids) + max(map(len, whole.options or [()]))
    told = rf"^1 of 2 lines have more than 5 tokens \(the longest {longest}\): a prompt has lost"
    with pytest.warns(UserWarning, match=told) as seen:
        assert tokenize([record, {"text": "a b"}], tokenizer, max_length=5)[0] == want
    assert len(seen) == 1


def test_tools_are_for_the_chat_template():
    template = "{% for t in tools or [] %}{{ t['name'] + ' ' }}{% endfor %}" + CHAT
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "yes"}]
    tokenizer = words(template=template)
    assert tokenize([{"messages": turns, "tools": [{"name": "b"}, {"name": "c"}]}], tokenizer) == [
        learned("b c user : a assistant :", "yes")
    ]
    assert (
        tokenize([{"messages": turns, "tools": None}], tokenizer)
        == tokenize([{"messages": turns}], tokenizer)
        == [learned("user : a assistant :", "yes")]
    )


# ------------------------------------------------------------------------------------------------ the boundary


def test_a_token_across_the_cut_is_learned_and_said_once(tmp_path):
    tokenizer = zoo.make("tiktoken")
    path = tiny.write_jsonl(
        tmp_path / "d.jsonl",
        [
            {"prompt": "Topic:", "completion": " yes"},
            {"prompt": "Topic: ", "completion": "yes"},
            {"prompt": "no hel", "completion": "lo"},
            {"prompt": "Topic: \n", "completion": "no"},
        ],
    )
    with pytest.warns(UserWarning, match="a token holds the prompt's end and what follows it") as seen:
        clean, space, word, split = tokenize(read_records(path), tokenizer)
    [said] = [str(w.message) for w in seen]
    assert said.startswith(f"in 2 of 4 lines of {path} a token holds")
    assert f"(the first: {path}, line 2)" in said
    assert space == clean
    assert tokenizer.convert_ids_to_tokens(word.ids[-2:]) == ["Ġhello", "</s>"]
    assert word.labels == (IGNORED,) * (len(word.ids) - 2) + word.ids[-2:]
    assert tokenizer.decode([i for i in split.labels if i != IGNORED]) == "no</s>"


def test_options_share_the_tokens_that_all_their_texts_begin_with():
    """Behind "Topic: " one option takes the prompt's space, the other leaves it."""
    tokenizer = zoo.make("tiktoken")
    with pytest.warns(UserWarning, match="in 1 of 1 lines a token holds"):
        [example] = tokenize([{"prompt": "Topic: ", "options": ["yes", "\nno"], "label": 0}], tokenizer)
    said = [tokenizer.convert_ids_to_tokens(part) for part in (example.ids, *example.options)]
    assert said == [["<s>", "Topic", ":"], ["Ġyes"], ["ĠĊ", "no"]]


def test_options_whose_texts_split_the_prompt_otherwise_share_what_is_alike():
    """Behind a space and a line end, another line end is another token; no token lies across a cut."""
    tokenizer = zoo.make("bytes")
    with pytest.warns(UserWarning, match="in 1 of 1 lines a token holds"):
        [example] = tokenize([{"prompt": "Topic: \n", "options": ["no", "\nno"], "label": 0}], tokenizer)
    said = [tokenizer.convert_ids_to_tokens(part) for part in (example.ids, *example.options)]
    assert said == [["Topic", ":"], ["Ġ", "Ċ", "no"], ["ĠĊ", "Ċ", "no"]]


class SlowWords(zoo.Slow):
    def _tokenize(self, text, **_):
        return text.split()


@pytest.mark.parametrize(
    "make", [lambda: words("$A", eos=None), lambda: SlowWords(ID, unk_token="<unk>")], ids=["fast", "slow"]
)
@pytest.mark.parametrize(
    ("prompt", "completion", "want"),
    [
        ("a b", "yes", learned("a b", "yes")),
        ("a zzz", "yes please", learned("a <unk>", "yes please")),
        ("a zzz", " yes", learned("a <unk>", "yes")),
        ("a b", "zzz", learned("a b", "<unk>")),
        ("a zzz", "yes", learned("a <unk>", "yes")),
        ("a zzz", "zzz yes", learned("a", "<unk> yes")),
    ],
)
def test_an_unknown_token_across_the_cut_hides_no_known_word(make, prompt, completion, want):
    """Prompt and completion, where the word that both make is unknown: encoded by themselves, unless both are."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert tokenize([{"prompt": prompt, "completion": completion}], make()) == [want]
    assert len(seen) == (completion == "zzz yes")


def test_options_behind_an_unknown_word_are_encoded_alike():
    [example] = tokenize([{"prompt": "a b", "options": ["yes", " no"], "label": 0}], words("<s> $A </s>"))
    assert example == Example(ids("<s> a b"), options=(ids("yes"), ids("no")), label=0)


def test_an_unknown_token_that_one_option_goes_on_with_stands_in_all_of_them():
    """ "zzzzzz" and "zzz" are the same unknown token; only the first holds text of its option."""
    with pytest.warns(UserWarning, match="in 1 of 1 lines a token holds"):
        [example] = tokenize([{"prompt": "a zzz", "options": [" no", "zzz yes"], "label": 0}], words("$A"))
    assert example == Example(ids("a"), options=(ids("<unk> no"), ids("<unk> yes")), label=0)


def test_a_line_is_read_as_its_first_form_whatever_else_it_has():
    tokenizer = words("$A")
    extra = {"text": 3, "id": 4, "options": None}
    records = [
        {"prompt": "a", "completion": " yes"},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "yes"}]},
    ]
    assert tokenize([record | extra for record in records], tokenizer) == tokenize(records, tokenizer)
    with pytest.raises(ValueError, match="example 1: has the keys"):
        tokenize([{"question": "a"}], tokenizer)


def test_every_pass_sees_each_example_once():
    lengths, strata = [5 + i % 7 for i in range(48)], [i % 3 for i in range(48)]
    first = [batch_indices(t, lengths, 6, seed=3, strata=strata) for t in range(8)]
    assert sorted(itertools.chain(*first)) == list(range(48))
    assert all(sorted(strata[i] for i in batch) == [0, 0, 1, 1, 2, 2] for batch in first)
    again = [batch_indices(t, lengths, 6, seed=3, strata=strata) for t in range(8)]
    assert first == again
    assert first != [batch_indices(t, lengths, 6, seed=4, strata=strata) for t in range(8)]
    second = [batch_indices(t, lengths, 6, 3, strata) for t in range(8, 16)]
    assert sorted(itertools.chain(*second)) == list(range(48))

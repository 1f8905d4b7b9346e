"""Which messages of a conversation are learned: the last, or all of the assistant's."""

import json
import warnings

import pytest
from tokenizers import normalizers

from qzo.cli.main import main
from qzo.training.data import IGNORED, tokenize
from tests.support import tiny
from tests.training.test_data import ID, ids, words

PROMPT = "{% if add_generation_prompt %}{{ 'assistant : ' }}{% endif %}"
CLOSED = "{% for m in messages %}{{ m['role'] + ' : ' + m['content'] + ' </s> ' }}{% endfor %}" + PROMPT
TURNS = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "b"},
    {"role": "assistant", "content": "no please"},
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": "yes"},
]


def spoken(example, tokenizer):
    """What is learned of an example, as text, each stretch by itself."""
    stretches: list[list[int]] = []
    before = IGNORED
    for label in example.labels:
        if label != IGNORED and before == IGNORED:
            stretches.append([])
        if label != IGNORED:
            stretches[-1].append(label)
        before = label
    return [tokenizer.decode(stretch) for stretch in stretches]


def test_all_or_the_last():
    tokenizer = words("<s> $A", CLOSED)
    [last] = tokenize([{"messages": TURNS}], tokenizer)
    [every] = tokenize([{"messages": TURNS}], tokenizer, chat_loss="all")
    assert last.ids == every.ids
    assert spoken(last, tokenizer) == ["yes </s>"]
    assert spoken(every, tokenizer) == ["yes </s>", "no please </s>", "yes </s>"]
    text = (
        "user : a </s> assistant : yes </s> user : b </s> assistant : no please </s> user : c </s> assistant : yes </s>"
    )
    assert every.ids == ids(text)
    assert all(label in (IGNORED, token) for token, label in zip(every.ids, every.labels, strict=True))
    assert every.labels[:8] == (IGNORED,) * 6 + ids("yes </s>")
    single = {"messages": TURNS[:2]}
    assert tokenize([single], tokenizer, chat_loss="all") == tokenize([single], tokenizer)


def test_what_begins_a_conversation_answers_nothing():
    tokenizer = words("$A", CLOSED)
    [example] = tokenize([{"messages": TURNS[1:4]}], tokenizer, chat_loss="all")
    assert spoken(example, tokenizer) == ["no please </s>"]


def test_a_call_is_learned_and_the_tools_answer_is_not():
    template = (
        "{% for m in messages %}{{ m['role'] }} : {{ m['content'] or '' }} {% for c in m['tool_calls'] or [] %}"
        "{{ c['function']['arguments']['q'] }} {% endfor %}</s> {% endfor %}" + PROMPT
    )
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"q": "b"}}}]}
    turns = [TURNS[0], call, {"role": "tool", "content": "c"}, TURNS[1]]
    tokenizer = words("$A", template)
    [example] = tokenize([{"messages": turns}], tokenizer, chat_loss="all")
    assert spoken(example, tokenizer) == ["b </s>", "yes </s>"]


def test_a_template_that_changes_turns_once_others_follow_is_refused():
    """As Qwen3's, which leaves the thoughts out of all but the last answer."""
    template = CLOSED.replace(
        "m['content'] +", "('b ' if loop.last and m['role'] == 'assistant' else '') + m['content'] +"
    )
    tokenizer = words("$A", template)
    with pytest.raises(ValueError) as error:
        tokenize([{"messages": TURNS}], tokenizer, chat_loss="all")
    assert str(error.value) == (
        "example 1: the chat template renders messages[1] otherwise when others follow it, so what would be learned is "
        "not what a server asks for: give --chat-loss last, or a line for each turn of the assistant"
    )


def test_a_token_across_the_beginning_of_any_turn_is_warned_of():
    template = CLOSED.replace("m['content'] +", "('a' if m['role'] == 'assistant' else '') + m['content'] +")
    tokenizer = words("$A", template.replace("'assistant : '", "'assistant : a'"))
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("ab", " c")
    turns = [TURNS[0], {"role": "assistant", "content": "b yes"}, TURNS[2], {"role": "assistant", "content": " no"}]
    with pytest.warns(UserWarning, match="in 1 of 1 lines a token holds the prompt's end"):
        [example] = tokenize([{"messages": turns}], tokenizer, chat_loss="all")
    assert spoken(example, tokenizer) == ["c yes </s>", "no </s>"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenize([{"messages": turns}], tokenizer)


def test_labels_that_are_cut_are_counted():
    tokenizer = words("<s> $A", "<s> " + CLOSED)
    record = {"messages": TURNS}
    [whole] = tokenize([record], tokenizer, chat_loss="all")
    room = len(whole.ids) - 8  # cuts "user : a </s> assistant : yes </s>" and one more
    with pytest.warns(UserWarning, match=r"have more than .*; 2 tokens that would have been learned are cut off$"):
        [cut] = tokenize([record], tokenizer, room, chat_loss="all")
    assert cut.ids == (ID["<s>"], *whole.ids[9:])
    assert cut.labels == (IGNORED, *whole.labels[9:])
    with pytest.warns(UserWarning, match=r"a text its end \(--max-length\)$"):
        tokenize([record], tokenizer, room)
    with pytest.warns(UserWarning, match=r"; 3 tokens that would have been learned are cut off$"):
        tokenize([{"text": "a b c a b"}], words("$A", eos=None), 2)
    with pytest.raises(ValueError, match="example 1: a completion has 2 tokens: it does not fit behind its prompt"):
        tokenize([record], tokenizer, 2, chat_loss="all")


def test_the_command_line_takes_it(tmp_path, capsys):
    base = tiny.save_checkpoint(tmp_path / "base")
    words("$A", CLOSED).save_pretrained(base)
    data = tiny.write_jsonl(tmp_path / "d.jsonl", [{"messages": TURNS}] * 4)
    line = ["train", str(base), "--data", str(data), "--group-size", "32", "--device", "cpu", "--max-steps", "1"]
    line += ["--batch-size", "2", "--directions", "1", "--json"]
    losses = {}
    for which in ("last", "all"):
        out = tmp_path / which
        assert main([*line, "--chat-loss", which, "--output-dir", str(out)]) == 0
        assert json.loads((out / "run.json").read_text())["settings"]["chat_loss"] == which
        losses[which] = json.loads((out / "metrics.jsonl").read_text())["loss"]
    assert losses["last"] != losses["all"]
    capsys.readouterr()
    assert main([*line, "--chat-loss", "last", "--output-dir", str(tmp_path / "all"), "--resume"]) == 2
    assert "data" in capsys.readouterr().err

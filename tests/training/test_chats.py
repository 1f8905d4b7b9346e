"""Conversations of every shape that data sets have, as a chat template is given them; and each key that is wrong."""

import pytest

from qzo.training.chats import conversation, instruction
from qzo.training.data import tokenize
from qzo.training.records import problem
from tests.training.test_data import learned, words

USER, YES = {"role": "user", "content": "a"}, {"role": "assistant", "content": "yes"}
CALL = {"type": "function", "id": "1", "function": {"name": "look", "arguments": {"q": "b"}}}
TURNS = "{% for m in messages %}{{ m['role'] }} : {{ m['content'] or '' }} %s{% endfor %}"
PROMPT = "{% if add_generation_prompt %}{{ 'assistant : ' }}{% endif %}"


def calling(rendered):
    """A template that renders each call's arguments so."""
    return TURNS.replace("%s", f"{{% for c in m['tool_calls'] or [] %}}{{{{ {rendered} }}}} {{% endfor %}}") + PROMPT


def test_messages_with_tools_are_read_as_they_are():
    calls = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    tool = {"role": "tool", "tool_call_id": "1", "content": "b"}
    messages, tools = conversation({"messages": [USER, calls, tool, YES], "tools": [{"name": "look"}]})
    assert messages == [USER, calls, tool, YES]
    assert tools == [{"name": "look"}]
    assert conversation({"messages": [USER, calls]}) == ([USER, calls], None)
    without = {key: value for key, value in calls.items() if key != "content"}
    assert conversation({"messages": [USER, without]})[0] == [USER, without]


def test_arguments_tools_and_parts_become_what_templates_take():
    text = {"function": {"name": "look", "arguments": '{"q": "b"}'}}
    bare = {"name": "look", "arguments": {"q": "b"}}
    for call in (text, bare):
        messages, tools = conversation(
            {"messages": [USER, {"role": "assistant", "tool_calls": [call]}], "tools": '[{"name": "look"}]'}
        )
        assert messages[1]["tool_calls"][0]["function"] == {"name": "look", "arguments": {"q": "b"}}
        assert tools == [{"name": "look"}]
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    assert conversation({"messages": [{"role": "user", "content": parts}, YES]})[0][0]["content"] == "a b"
    for empty in (None, []):
        assert conversation({"messages": [USER, {**YES, "tool_calls": empty}]})[0] == [USER, YES]


def test_calls_are_learned_and_learned_from():
    record = {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}]}
    tokenizer = words("$A", calling("c['function']['arguments']['q']"))
    assert tokenize([record], tokenizer) == [learned("user : a assistant :", "b")]
    record["messages"] += [{"role": "tool", "content": "c"}, YES]
    [example] = tokenize([record], tokenizer)
    assert tokenizer.decode([i for i in example.labels if i >= 0]) == "yes"


def test_a_template_that_wants_arguments_as_text_gets_text():
    record = {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}, USER, YES]}
    tokenizer = words("$A", calling("'b ' + c['function']['arguments']"))
    [example] = tokenize([record], tokenizer)
    rendered = tokenizer.decode(example.ids)
    assert rendered == "user : a assistant : b <unk> <unk> user : a assistant : yes"
    failing = words("$A", calling("c['function']['arguments'].q.q.q.q"))
    with pytest.raises(ValueError, match="example 1: the chat template refuses messages of the roles user, assistant"):
        tokenize([record], failing)


def test_sharegpt():
    turns = [
        {"from": "human", "value": "a"},
        {"from": "function_call", "value": '{"name": "look", "arguments": {"q": "b"}}'},
        {"from": "observation", "value": "b"},
        {"from": "gpt", "value": "yes", "weight": 1},
    ]
    call = {"type": "function", "function": {"name": "look", "arguments": {"q": "b"}}}
    want = [
        {"role": "system", "content": "c"},
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "b"},
        YES,
    ]
    assert conversation({"conversations": turns, "system": "c"}) == (want, None)
    assert conversation({"conversations": [{"from": "system", "value": "c"}, *turns]}) == (want, None)
    assert conversation({"conversations": [USER, YES]}) == conversation({"messages": [USER, YES]})
    assert conversation({"messages": turns}) == (want[1:], None)
    record = {"conversations": [turns[0], turns[3]]}
    assert tokenize([record], words("$A")) == tokenize([{"messages": [USER, YES]}], words("$A"))


def test_a_prompt_and_a_completion_of_messages_are_one_conversation():
    both = {"prompt": [USER], "completion": [YES], "tools": [{"name": "look"}]}
    assert problem(both) is None
    assert conversation(both) == ([USER, YES], [{"name": "look"}])
    assert tokenize([both], words("$A")) == tokenize([{"messages": [USER, YES]}], words("$A"))


def test_alpaca_is_a_conversation_where_there_is_a_template():
    tokenizer = words("$A")
    plain = {"instruction": "a", "input": "", "output": "yes"}
    assert conversation(plain) == ([USER, YES], None)
    assert conversation({**plain, "input": "b"})[0][0]["content"] == "a\nb"
    assert conversation({**plain, "system": "c"})[0][0] == {"role": "system", "content": "c"}
    want = tokenize([{"messages": [USER, YES]}], tokenizer)
    assert tokenize([plain], tokenizer) == want == tokenize([{"instruction": "a", "output": "yes"}], tokenizer)
    assert tokenize([{**plain, "input": None, "history": []}], tokenizer) == want


def test_alpaca_is_its_own_prompt_where_there_is_none():
    record = {"instruction": "Add.", "input": "1 2", "output": "3"}
    prompt, completion = instruction(record)
    assert completion == "3"
    assert prompt == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n"
        "### Response:\n"
    )
    prompt, _ = instruction({**record, "input": ""})
    assert prompt == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Response:\n"
    )
    tokenizer = words("$A", template=None)
    both = dict(zip(("prompt", "completion"), instruction(record), strict=True))
    assert tokenize([record], tokenizer) == tokenize([both], tokenizer)
    assert tokenize([record], words("<s> $A"), encoder=True) == tokenize([both], words("<s> $A"), encoder=True)


MORE = "'messages' must end with the assistant's, which is learned, after at least one other"


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"messages": "a"}, "'messages' must be a list of {role, content} or of {from, value}, got str"),
        ({"conversations": {}}, "'conversations' must be a list of"),
        ({"messages": []}, MORE),
        ({"messages": [YES]}, f"{MORE}; the last of 1 is of the role 'assistant'"),
        ({"messages": [YES, USER]}, f"{MORE}; the last of 2 is of the role 'user'"),
        ({"messages": [USER, 3]}, "messages[1] must be an object with 'role' and 'content', got int"),
        ({"messages": [USER, {"content": "a"}]}, "messages[1] has no 'role', a string: its keys are ['content']"),
        ({"messages": [{"role": 3, "content": "a"}, YES]}, "messages[0]['role'] must be a string, got int 3"),
        (
            {"messages": [{"role": "user"}, YES]},
            "messages[0] has no 'content', a string (or null beside 'tool_calls'): its keys are ['role']",
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": None}]},
            "messages[1]['content'] must be a string (or null beside 'tool_calls'), got null",
        ),
        ({"messages": [USER, {"role": "tool", "content": {"a": 1}}, YES]}, "messages[1]['content'] must be a string"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, YES]},
            "messages[0]['content'][0] must be {'type': 'text', 'text': ...}, got 'image_url'",
        ),
        (
            {"messages": [{"role": "user", "content": ["a"]}, YES]},
            "messages[0]['content'][0] must be {'type': 'text', 'text': ...}, got 'str'",
        ),
        (
            {"messages": [USER, {**YES, "tool_calls": {"name": "f"}}]},
            "messages[1]['tool_calls'] must be a list of calls, got dict",
        ),
        (
            {"messages": [USER, {**YES, "tool_calls": ["f"]}]},
            "messages[1]['tool_calls'][0] must be an object, got str",
        ),
        (
            {"messages": [USER, {**YES, "tool_calls": [{"function": {"arguments": {}}}]}]},
            "messages[1]['tool_calls'][0] must be {'function': {'name': ..., 'arguments': ...}}, got dict",
        ),
        (
            {"messages": [USER, {**YES, "tool_calls": [{"function": {"name": "f", "arguments": "q=1"}}]}]},
            "messages[1]['tool_calls'][0]: the arguments of 'f' must be an object or the JSON text of one, got str",
        ),
        (
            {"conversations": [{"from": "narrator", "value": "a"}, YES]},
            "conversations[0]['from'] is 'narrator'; known are system, human, user, gpt",
        ),
        ({"conversations": [{"from": ["a"], "value": "a"}, YES]}, "conversations[0]['from'] is ['a']; known are"),
        (
            {"conversations": [{"from": "human"}, YES]},
            "conversations[0] has no 'value', a string: its keys are ['from']",
        ),
        (
            {"conversations": [{"from": "human", "value": None}, YES]},
            "conversations[0]['value'] must be a string, got null",
        ),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "look(b)"}]},
            "conversations[1]['value'] must be the JSON text of a call, {name, arguments}: it is not JSON",
        ),
        ({"conversations": [USER, YES], "system": 3}, "'system' must be a string, got int 3"),
        ({"instruction": 3, "output": "a"}, "'instruction' must be a string, got int 3"),
        ({"instruction": "a", "output": None}, "'output' must be a string, got null"),
        ({"instruction": "a", "output": "b", "input": ["c"]}, "'input' must be a string, got list ['c']"),
        (
            {"instruction": "a", "output": "b", "history": [["c", "d"]]},
            "'history' is not read beside an instruction: give the whole conversation as 'messages'",
        ),
        (
            {"prompt": [USER], "completion": "yes"},
            "'prompt' must be a string, got list: give a conversation as 'messages', or both 'prompt' and 'completion'",
        ),
        (
            {"prompt": "a", "completion": [YES]},
            "'completion' must be a string, got list: give a conversation as 'messages', or both 'prompt' and",
        ),
        ({"text": [USER]}, "'text' must be a string, got list: give a conversation as 'messages'"),
        ({"prompt": [USER], "completion": []}, "'completion' must end with the assistant's, which is learned"),
        ({"prompt": [3], "completion": [YES]}, "prompt[0] must be an object with 'role' and 'content', got int"),
        ({"prompt": [USER], "completion": [{"role": "assistant"}]}, "completion[0] has no 'content', a string"),
    ],
)
def test_the_key_that_is_wrong_is_named(record, said):
    told = problem(record)
    assert told is not None
    assert said in told
    assert len(told.splitlines()) == 1

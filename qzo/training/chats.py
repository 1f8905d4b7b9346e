"""Conversations as a chat template takes them, from the shapes that data sets have.

    {"messages": [{"role": ..., "content": ...}, ...]}          OpenAI's; content may be null beside `tool_calls`, or a
                                                                list of parts of text
    {"conversations": [{"from": ..., "value": ...}, ...]}       ShareGPT's; perhaps with "system" beside them
    {"instruction": ..., "input": ..., "output": ...}           Alpaca's; no input, "" and null are the same
    {"prompt": [...], "completion": [...]}                      TRL's: lists of messages, the one goes on with the other

Both kinds of turn are read in either list. "tools" beside them is a list of objects, or the JSON text of one. What a
template is given: roles system, user, assistant, tool (or any other that a message names), arguments of calls as
objects; where the template wants their JSON text, `written` gives that.
"""

import json
from typing import Any

Record = dict[str, Any]

ROLES = {  # ShareGPT's names -> the roles of templates
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
LISTS = (("prompt", "completion"), ("messages",), ("conversations",))  # keys of lists of messages, in order
ALPACA = (  # the prompt of Stanford's Alpaca, for models without a chat template
    "Below is an instruction that describes a task{}. Write a response that appropriately completes the request.\n\n"
)
PAIRED = ", paired with an input that provides further context"


def conversation(record: Record) -> tuple[list[Record], list[Record] | None]:
    """(messages, tools or None) of a record of messages, conversations, an instruction, or a prompt and a completion
    that are lists of messages. ValueError names the key of the message that is wrong, what was wanted there and what it
    is."""
    keys = next((keys for keys in LISTS if keys[-1] in record), None)
    if keys is None:
        return _instructed(record), None
    messages = []
    for key in keys:
        turns = record[key]
        if not isinstance(turns, list):
            raise ValueError(
                f"{key!r} must be a list of {{role, content}} or of {{from, value}}, got {type(turns).__name__}"
            )
        messages += [_message(f"{key}[{number}]", turn) for number, turn in enumerate(turns)]
    key = keys[-1]
    system = _text(record, "system", optional=True) if key == "conversations" else ""
    if system and messages and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        last = f"; the last of {len(messages)} is of the role {messages[-1]['role']!a}" if messages else ""
        raise ValueError(f"{key!r} must end with the assistant's, which is learned, after at least one other{last}")
    return messages, _tools(record.get("tools"))


def instruction(record: Record) -> tuple[str, str]:
    """(prompt, completion) of Alpaca's record for a model without a chat template, in the words that Alpaca used.
    ValueError names the key that is wrong."""
    *system, _, answered = (message["content"] for message in _instructed(record))
    given = _text(record, "input", optional=True)
    said = f"### Instruction:\n{record['instruction']}\n\n" + (f"### Input:\n{given}\n\n" if given else "")
    prompt = ALPACA.format(PAIRED if given else "") + said + "### Response:\n"
    return "".join(f"{text}\n\n" for text in system) + prompt, answered


def written(messages: list[Record]) -> list[Record] | None:
    """The messages with the arguments of their calls as JSON text, as some templates want them; None without calls."""
    if not any(message.get("tool_calls") for message in messages):
        return None
    return [
        {**message, "tool_calls": [_written_call(call) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in messages
    ]


def _instructed(record: Record) -> list[Record]:
    """Alpaca's record as messages: the input stands on the line below the instruction."""
    asked, answer = _text(record, "instruction"), _text(record, "output")
    given, system = _text(record, "input", optional=True), _text(record, "system", optional=True)
    if record.get("history"):
        raise ValueError("'history' is not read beside an instruction: give the whole conversation as 'messages'")
    return [
        *([{"role": "system", "content": system}] if system else []),
        {"role": "user", "content": f"{asked}\n{given}" if given else asked},
        {"role": "assistant", "content": answer},
    ]


def _message(place: str, turn: Any) -> Record:
    """A turn of a conversation as a message. place: what errors call it."""
    if not isinstance(turn, dict):
        raise ValueError(f"{place} must be an object with 'role' and 'content', got {type(turn).__name__}")
    if "role" not in turn and "from" in turn:
        return _shared(place, turn)
    if not isinstance(turn.get("role"), str):
        raise ValueError(_wrong(place, turn, "role", "a string"))
    message = dict(turn)
    if turn.get("tool_calls") not in (None, []):
        message["tool_calls"] = _calls(f"{place}['tool_calls']", turn["tool_calls"])
    else:
        message.pop("tool_calls", None)
    content = turn.get("content")
    if isinstance(content, list):
        message["content"] = _joined_parts(f"{place}['content']", content)
    elif not isinstance(content, str) and not (content is None and message.get("tool_calls")):
        raise ValueError(_wrong(place, turn, "content", "a string (or null beside 'tool_calls')"))
    return message


def _shared(place: str, turn: Record) -> Record:
    """The message of a turn of ShareGPT's."""
    speaker, value = turn["from"], turn.get("value")
    role = ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise ValueError(f"{place}['from'] is {speaker!a}; known are {', '.join(ROLES)}")
    if not isinstance(value, str):
        raise ValueError(_wrong(place, turn, "value", "a string"))
    if speaker != "function_call":
        return {"role": role, "content": value}
    try:
        calls = json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{place}['value'] must be the JSON text of a call, {{name, arguments}}: it is not JSON ({error})"
        ) from None
    calls = calls if isinstance(calls, list) else [calls]
    return {"role": role, "content": None, "tool_calls": _calls(f"{place}['value']", calls)}


def _calls(place: str, calls: Any) -> list[Record]:
    """Checked calls of tools, {"type": "function", "function": {"name", "arguments"}}, arguments as objects."""
    if not isinstance(calls, list) or not calls:
        raise ValueError(f"{place} must be a list of calls, got {_kind(calls)}")
    checked = []
    for number, call in enumerate(calls):
        where = f"{place}[{number}]"
        if not isinstance(call, dict):
            raise ValueError(f"{where} must be an object, got {type(call).__name__}")
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f"{where} must be {{'function': {{'name': ..., 'arguments': ...}}}}, got {_kind(call)}")
        arguments = function.get("arguments", {})
        try:
            parsed = json.loads(arguments) if isinstance(arguments, str) else arguments
        except (ValueError, RecursionError):
            parsed = None
        if not isinstance(parsed, dict):
            raise ValueError(
                f"{where}: the arguments of {function['name']!a} must be an object or the JSON text of one, "
                f"got {_kind(arguments)}"
            )
        outer = call if "function" in call else {"type": "function"}
        checked.append({**outer, "function": {**function, "arguments": parsed}})
    return checked


def _written_call(call: Record) -> Record:
    function = call["function"]
    return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}


def _joined_parts(place: str, parts: list) -> str:
    """The text of a content given in parts."""
    for number, part in enumerate(parts):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type", sorted(part)) if isinstance(part, dict) else type(part).__name__
            raise ValueError(
                f"{place}[{number}] must be {{'type': 'text', 'text': ...}}, got {kind!a}: text is trained"
            )
    return "".join(part["text"] for part in parts)


def _tools(tools: Any) -> list[Record] | None:
    """The tools of a record, which may be JSON text. ValueError for what is no list of objects."""
    found = tools
    if isinstance(tools, str):
        try:
            found = json.loads(tools) if tools.strip() else None
        except (ValueError, RecursionError):
            found = tools
    if found is None or (isinstance(found, list) and all(isinstance(tool, dict) for tool in found)):
        return found
    raise ValueError(f"'tools' must be a list of objects, or the JSON text of one, got {_kind(tools)}")


def _text(record: Record, key: str, optional: bool = False) -> str:
    """A text of a record; "" for one that may be left out, and is."""
    value = record.get(key)
    if optional and value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"{key!r} must be a string, got {_kind(value)}")
    return value


def _wrong(place: str, turn: Record, key: str, wanted: str) -> str:
    """What is wrong with a turn's key."""
    if key not in turn:
        return f"{place} has no {key!r}, {wanted}: its keys are {sorted(map(str, turn))}"
    return f"{place}[{key!r}] must be {wanted}, got {_kind(turn[key])}"


def _kind(value: Any) -> str:
    """A value's type, or what there is of a short one."""
    if value is None:
        return "null"
    shown = ascii(value)
    return type(value).__name__ if len(shown) > 40 else f"{type(value).__name__} {shown}"

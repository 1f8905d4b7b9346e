"""Lines that cannot be learned, each named with its file and number."""

import json

import pytest
from tokenizers import normalizers

from qzo.cli.main import main
from qzo.training.data import tokenize
from qzo.training.records import read_records
from tests.support import tiny, zoo
from tests.training.test_data import CHAT, learned, words


def named(tmp_path, record, tokenizer, **options):
    """What is said of a record on the fourth line of a file, the third of its examples."""
    path = tmp_path / "d.jsonl"
    fine = '{"prompt": "a", "completion": " b"}'
    path.write_text(f"{fine}\n\n{fine}\n{json.dumps(record)}\n")
    with pytest.raises(ValueError) as error:
        tokenize(read_records(path), tokenizer, **options)
    start = f"{path}, line 4: "
    assert str(error.value).startswith(start)
    return str(error.value).removeprefix(start)


HALF = "a \ud800 b"
YES = {"role": "assistant", "content": "yes"}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"a": HALF}}}]}
WITH_TOOLS = (
    "{% for t in tools or [] %}{{ t['name'] + ' ' }}{% endfor %}"
    "{% for m in messages %}{{ m['role'] }} : {{ m['content'] or '' }} "
    "{% for c in m['tool_calls'] or [] %}{{ c['function']['arguments'] | tojson }} {% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant : ' }}{% endif %}"
)


HALVES = [
    {"text": HALF},
    {"prompt": HALF, "completion": "a"},
    {"prompt": "a", "completion": HALF},
    {"prompt": HALF, "options": ["a", "b"], "label": 0},
    {"prompt": "a", "options": ["a", HALF], "label": 0},
    {"prompt": "a", "options": ["a", HALF], "label": HALF},
    {"instruction": HALF, "output": "a"},
    {"instruction": "a", "input": HALF, "output": "a"},
    {"instruction": "a", "output": HALF},
]
CHAT_HALVES = [
    {"messages": [{"role": "user", "content": HALF}, {"role": "assistant", "content": "a"}]},
    {"messages": [{"role": HALF, "content": "a"}, {"role": "assistant", "content": "a"}]},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": HALF}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": HALF}]}, YES]},
    {"messages": [{"role": "user", "content": "a"}, CALL, YES]},
    {"messages": [{"role": "user", "content": "a"}, YES], "tools": [{"name": HALF}]},
    {"messages": [{"role": "user", "content": "a"}, YES], "tools": json.dumps([{"name": HALF}])},
    {"conversations": [{"from": "human", "value": HALF}, {"from": "gpt", "value": "a"}]},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": HALF}]},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": HALF},
]


@pytest.mark.parametrize(
    ("record", "template"), [*((r, WITH_TOOLS) for r in HALVES + CHAT_HALVES), *((r, None) for r in HALVES)]
)
def test_half_a_surrogate_pair(tmp_path, record, template):
    said = named(tmp_path, record, words(template=template))
    assert r"half of a surrogate pair, '\ud800' in '" in said
    assert said.isascii()


LONG = "a b " * 4


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"text": ""}, "the text '' has no tokens"),
        ({"text": " \n"}, r"the text ' \n' has no tokens"),
        ({"text": "a"}, "the text is one token: nothing to predict"),
        ({"prompt": "a", "completion": ""}, "the completion '' has no tokens; one that ends at once is the EOS"),
        ({"prompt": "a", "completion": "  "}, "the completion '  ' has no tokens"),
        ({"prompt": "", "completion": "a"}, "the prompt and its completion are one token together: nothing to predict"),
        ({"prompt": "", "options": ["a", "b"], "label": 0}, "no token of the prompt stands before its options"),
        ({"prompt": "a", "options": [" b", " "], "label": 0}, "the option ' ' has no tokens"),
        (
            {"prompt": "a", "options": [" b", " c", "  b "], "label": 0},
            "the options ' b' and '  b ' are the same tokens",
        ),
        ({"prompt": "a", "options": [" z", " c", " y"], "label": 0}, "the options ' z' and ' y' are the same tokens"),
        (
            {"prompt": "a", "completion": f" {LONG}"},
            "a completion has 9 tokens: it does not fit behind its prompt in max_length=6 (--max-length)",
        ),
        ({"prompt": "", "completion": LONG}, "a completion has 9 tokens: it does not fit"),
        ({"prompt": "a", "options": [" b", f" {LONG}"], "label": 0}, "an option has 8 tokens: it does not fit"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": LONG}]},
            "a completion has 8 tokens: it does not fit",
        ),
    ],
)
def test_a_line_that_cannot_be_learned(tmp_path, record, said):
    assert named(tmp_path, record, words("$A"), max_length=6).startswith(said)


@pytest.mark.parametrize(
    "record",
    [{"prompt": HALF, "completion": "a"}, {"prompt": "a", "completion": HALF}, {"instruction": HALF, "output": "a"}],
)
def test_half_a_surrogate_pair_for_an_encoder(tmp_path, record):
    assert r"half of a surrogate pair, '\ud800' in '" in named(tmp_path, record, words(), encoder=True)


def test_half_a_surrogate_pair_in_an_array(tmp_path):
    path = tmp_path / "d.json"
    path.write_text(json.dumps([{"text": "a b"}, {"text": HALF}]))
    with pytest.raises(ValueError, match=r"d.json, record 2: a text has half of a surrogate pair"):
        tokenize(read_records(path), words())


def test_a_cut_that_leaves_nothing_to_predict():
    with pytest.raises(ValueError, match="example 1: max_length=1 leaves one token of the text"):
        tokenize([{"text": "a b"}], words("$A"), max_length=1)


CHATS = {
    "raises": ("{{ raise_exception('no system turn here') }}", "TemplateError: no system turn here"),
    "syntax": ("{% for m in messages %}{{ m['role'] }", "TemplateSyntaxError: "),
    "undefined": ("{{ messages[7]['role'].name.first }}", "UndefinedError: "),
    "type": ("{{ messages[0]['content'] + 1 }}", "TypeError: "),
    "arithmetic": ("{{ 1 // 0 }}", "ZeroDivisionError: "),
    "last alone": (
        "{% if messages[-1]['role'] == 'user' %}{{ raise_exception('user last') }}{% endif %}" + CHAT,
        "TemplateError: user last",
    ),
}
TURNS = {
    "messages": [
        {"role": "system", "content": "a"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "yes"},
    ]
}


@pytest.mark.parametrize("name", CHATS)
def test_a_chat_template_that_fails(tmp_path, name):
    template, why = CHATS[name]
    said = named(tmp_path, TURNS, words("$A", template))
    assert said.startswith("the chat template refuses messages of the roles system, user")
    assert why in said


def test_chats_that_no_template_can_give(tmp_path):
    assert named(tmp_path, TURNS, words("$A", None)) == (
        "the tokenizer has no chat template: put a chat_template.jinja, that of the model's chat version, beside its "
        "tokenizer_config.json, or give lines of prompt and completion"
    )
    assert named(tmp_path, TURNS, words("$A", "{{ messages | length }}")).startswith(
        "the chat template does not continue its own generation prompt"
    )
    assert named(tmp_path, TURNS, words("$A", "a")).startswith("the chat template gives the last message, 'yes', no")


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({**TURNS, "tools": "[b]"}, "'tools' must be a list of objects, or the JSON text of one, got str '[b]'"),
        ({**TURNS, "tools": ["b"]}, "'tools' must be a list of objects, or the JSON text of one, got list ['b']"),
        (
            {"prompt": "a", "completion": " b", "label": False},
            "'label' is false, and every completion is learned: leave",
        ),
    ],
)
def test_keys_that_would_be_passed_over(tmp_path, record, said):
    assert named(tmp_path, record, words()).startswith(said)


@pytest.mark.parametrize("line", ["[" * 100000 + "]" * 100000, '{"text": "a b", "id": ' + "1" * 5000 + "}"])
def test_json_that_is_too_much(tmp_path, line):
    path = tmp_path / "d.jsonl"
    path.write_text(f'{{"text": "a b"}}\n{line}\n')
    with pytest.raises(ValueError, match=r"d.jsonl, line 2: not JSON \("):
        read_records(path)


def test_special_tokens_that_cannot_be_told(tmp_path):
    class Odd(zoo.Slow):
        def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None):
            return token_ids_0[::-1]

    tokenizer = Odd({"<unk>": 0, "\u2581": 1, "a": 2, "b": 3}, unk_token="<unk>")
    with pytest.raises(ValueError, match="example 1: the tokenizer splits 'a b' otherwise when it adds"):
        tokenize([{"text": "a b"}], tokenizer)


@pytest.mark.parametrize(
    ("record", "what"),
    [
        (TURNS, "the chat template refuses messages"),
        ({"text": HALF}, "a text has half of a surrogate pair"),
        ({"prompt": HALF, "completion": "a"}, "a text has half of a surrogate pair"),
        ({"prompt": HALF, "options": ["a", "b"], "label": 0}, "a text has half of a surrogate pair"),
        ({"messages": [{"role": "user", "content": 3}, YES]}, "messages[0]['content'] must be a string"),
    ],
)
def test_the_command_line_says_it_in_one_line_and_writes_nothing(tmp_path, capsys, record, what):
    base = tiny.save_checkpoint(tmp_path / "base")
    words("$A", CHATS["raises"][0]).save_pretrained(base)
    data = tmp_path / "data"
    data.mkdir()
    tiny.write_jsonl(data / "train.jsonl", [{"text": "a b"}] * 4)
    tiny.write_jsonl(data / "valid.jsonl", [{"text": "a b"}, record])
    out = tmp_path / "out"
    assert (
        main(
            [
                "train",
                "--model",
                str(base),
                "--data",
                str(data),
                "--output-dir",
                str(out),
                "--group-size",
                "32",
                "--device",
                "cpu",
                "--max-steps",
                "1",
                "--batch-size",
                "2",
            ]
        )
        == 2
    )
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith(f"qzo train: {data / 'valid.jsonl'}, line 2: {what}")
    assert not out.exists()


def test_a_normalizer_that_joins_both_sides_is_a_token_across_the_cut():
    tokenizer = words("$A", eos=None)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("ab", " c")
    with pytest.warns(UserWarning, match="in 1 of 1 lines a token holds"):
        assert tokenize([{"prompt": "b a", "completion": "b yes"}], tokenizer) == [learned("b", "c yes")]

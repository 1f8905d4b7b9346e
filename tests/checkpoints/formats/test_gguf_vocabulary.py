"""Metadata of a GGUF's tokenizer that are missing, damaged or out of range."""

import warnings

import pytest

import qzo
from qzo.checkpoints.formats import gguf_config, gguf_tokenizer, gguf_vocabulary
from qzo.checkpoints.formats.gguf_vocabulary import CONTROL, NORMAL
from qzo.cli.main import main
from tests.checkpoints.formats.test_gguf_config import file_of as model_of
from tests.support.checkpoints import VOCAB, write_gguf
from tests.support.gguf_tokens import LETTERS, byte_level, file_of

TOKENS, MERGES = [*LETTERS, "he", "ll", "<|end|>"], ["h e", "l l"]
WHOLE = {
    "model": "gpt2",
    "pre": "qwen2",
    "tokens": TOKENS,
    "merges": MERGES,
    "eos_token_id": 258,
    "token_type": [NORMAL] * 258 + [CONTROL],
}
LLAMA = {
    "model": "llama",
    "tokens": ["<unk>", "<s>", "</s>", "a", "b"],
    "scores": [0.0, 0.0, 0.0, -1.0, -2.0],
    "token_type": [2, 3, 3, 1, 1],
}


@pytest.mark.parametrize(
    ("base", "change", "message"),
    [
        (WHOLE, {"model": None}, "model is None; those that can be read are gemma4, gpt2 and llama; give a folder"),
        (WHOLE, {"pre": ["qwen2"]}, r"pre is \['qwen2'\]"),
        (WHOLE, {"merges": None}, "no tokenizer.ggml.merges, which its tokenizer needs"),
        (WHOLE, {"merges": "h e"}, "merges is 'h e'; it has to be a list of str"),
        (WHOLE, {"merges": [1, 2]}, r"merges is \[1, 2\]; it has to be a list of str"),
        (WHOLE, {"merges": ["h e", "hell"]}, "merges holds 'hell' as 1, which is not two tokens that make a third"),
        (WHOLE, {"merges": ["h e", ""]}, "merges holds '' as 1, which"),
        (WHOLE, {"merges": ["h e", "he llo"]}, "merges holds 'he llo' as 1, which is not"),
        (
            WHOLE,
            {"merges": ["aa"], "tokens": [*TOKENS[:256], "aa", "aaa", "b2"]},
            "merges holds 'aa' as 0, which is not",
        ),
        (WHOLE, {"merges": ["h l"]}, "merges holds 'h l' as 0, which is not"),
        (WHOLE, {"tokens": []}, "tokens is empty"),
        (WHOLE, {"tokens": 5}, "tokens is 5; it has to be a list of str"),
        (WHOLE, {"tokens": [*TOKENS[:-1], 7]}, r"tokens is \[.*; it has to be a list of str"),
        (WHOLE, {"tokens": [*TOKENS[:-1], "he"]}, "tokens holds 'he' twice, as 256 and 258"),
        (WHOLE, {"token_type": [NORMAL] * 258}, "token_type has 258 entries for 259 tokens"),
        (WHOLE, {"token_type": [NORMAL] * 260}, "token_type has 260 entries for 259 tokens"),
        (WHOLE, {"token_type": ["1"] * 259}, r"token_type is \['1', .*; it has to be a list of int"),
        (WHOLE, {"eos_token_id": "258"}, "eos_token_id is '258'; it has to be a whole number"),
        (WHOLE, {"padding_token_id": True}, "padding_token_id is True; it has to be a whole number"),
        (WHOLE, {"bos_token_id": [1]}, r"bos_token_id is \[1\]; it has to be a whole number"),
        (WHOLE, {"add_bos_token": "yes"}, "add_bos_token is 'yes'; it has to be true or false"),
        (WHOLE, {"add_eos_token": 1}, "add_eos_token is 1; it has to be true or false"),
        (WHOLE, {"add_bos_token": True}, "add_bos_token is true, and tokenizer.ggml.bos_token_id names no token"),
        (
            WHOLE,
            {"add_eos_token": True, "eos_token_id": 5000},
            "add_eos_token is true, and .*eos_token_id names no token",
        ),
        (WHOLE, {"rows": 200}, "tokens has 259 entries, token_embd.weight 200 rows"),
        (LLAMA, {"scores": None}, "no tokenizer.ggml.scores, which its tokenizer needs"),
        (LLAMA, {"scores": [0.0] * 4}, "scores has 4 entries for 5 tokens"),
        (LLAMA, {"scores": [float("nan")] * 5}, "scores holds NaN"),
        (LLAMA, {"scores": ["0"] * 5}, r"scores is \['0', .*; it has to be a list of float or int"),
        (LLAMA, {"add_space_prefix": 0}, "add_space_prefix is 0; it has to be true or false"),
    ],
)
@pytest.mark.filterwarnings("ignore:m.gguf. tokenizer.ggml.eos_token_id is 5000")
def test_refused_by_the_key(base, change, message):
    with pytest.raises(ValueError, match=f"m.gguf: .*{message}") as error:
        gguf_tokenizer.load(file_of(**base | change))
    assert "\n" not in str(error.value)


def test_a_template_that_is_no_text_is_refused():
    file = file_of(**WHOLE)
    file.metadata["tokenizer.chat_template"] = ["{{ messages }}"]
    with pytest.raises(ValueError, match=r"chat_template is .*; it has to be a string"):
        gguf_tokenizer.load(file)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"eos_token_id": 5000}, {}),
        ({"padding_token_id": 259}, {"eos": 258}),
        ({"eos_token_id": -7}, {}),
        ({"unknown_token_id": 0, "bos_token_id": 258}, {"bos": 258, "eos": 258, "unknown": 0}),
    ],
)
def test_an_id_that_is_no_tokens_is_left_out(given, kept):
    file = file_of(**WHOLE | given)
    wrong = [name for name, index in given.items() if not 0 <= index < 259]
    assert gguf_vocabulary.token_ids(file) == kept
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        tokenizer = gguf_tokenizer.load(file)
    assert [name for name in wrong if not any(f"{name} is {given[name]}" in str(w.message) for w in said)] == []
    assert len(said) == len(wrong)
    found = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "unknown": tokenizer.unk_token_id,
        "padding": tokenizer.pad_token_id,
    }
    assert {role: index for role, index in found.items() if index is not None} == kept
    assert len(tokenizer) == 259


@pytest.mark.parametrize("none", [-1, 2**32 - 1])
def test_the_numbers_that_mean_no_token_need_no_warning(none):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert gguf_tokenizer.load(file_of(**WHOLE | {"padding_token_id": none})).pad_token_id is None


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ({"bos_token_id": 1, "eos_token_id": 79, "padding_token_id": 0}, (1, 79, 0)),
        ({"bos_token_id": 80, "eos_token_id": 5000, "padding_token_id": 2**32 - 1}, (None, None, None)),  # of 80 rows
        ({"bos_token_id": 3, "eos_token_id": 2, "tokens": ["a", "b", "c"]}, (None, 2, None)),
    ],
)
def test_the_configuration_has_ids_of_tokens_only(ids, expected):
    file = model_of("llama", {})
    file.metadata |= {f"tokenizer.ggml.{name}": value for name, value in ids.items()}
    found = gguf_config.config(file)
    assert tuple(found[f"{role}_token_id"] for role in ("bos", "eos", "pad")) == expected


def test_lists_that_llama_cpp_reads_are_read():
    tokens = [*TOKENS[:-1], ""]  # an empty token, twice the same merge, no types
    file = file_of(
        **WHOLE | {"tokens": tokens, "merges": ["h e", "l l", "h e"], "token_type": None, "eos_token_id": None}
    )
    tokenizer = gguf_tokenizer.load(file)
    assert tokenizer.tokenize("hell") == ["he", "ll"]
    assert tokenizer.convert_ids_to_tokens([258]) == ["[EMPTY_258]"]
    assert file.metadata["tokenizer.ggml.tokens"][258] == ""
    whole_numbers = gguf_tokenizer.load(file_of(**LLAMA | {"scores": [0, 0, 0, -1, -2]}))
    assert whole_numbers("a").input_ids[0] == 1


def test_missing_ids_of_a_sentencepiece_file_are_llama_cpps():
    tokenizer = gguf_tokenizer.load(file_of(**LLAMA))
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    plain = gguf_tokenizer.load(file_of(**LLAMA | {"token_type": [1, 1, 1, 1, 1], "tokens": [*"abcde"]}))
    assert (plain.unk_token_id, plain.bos_token_id, plain.eos_token_id) == (None, None, None)


def test_the_command_tells_it_in_one_line(tmp_path, capsys):
    lines = '{"prompt": "he", "completion": "ll"}\n' * 2
    (tmp_path / "t.jsonl").write_text(lines)
    tokens = [*"abcdefghijklmnopqrstuvwxyz", "he", "ll"]
    whole = {
        "tokenizer_model": "gpt2",
        "tokenizer_pre": "gpt-2",
        "token_list": tokens,
        "token_merges": MERGES,
        "eos_token_id": 5000,
        "pad_token_id": 2**32 - 1,
    }

    def train(name, **change):
        write_gguf(
            tmp_path / "m.gguf", tokenizer={key: value for key, value in (whole | change).items() if value is not None}
        )
        return main(
            [
                "train",
                "--model",
                str(tmp_path / "m.gguf"),
                "--data",
                str(tmp_path / "t.jsonl"),
                "--output-dir",
                str(tmp_path / name),
                "--max-steps",
                "1",
                "--batch-size",
                "1",
                "--device",
                "cpu",
            ]
        )

    assert len(tokens) <= VOCAB
    assert train("merges", token_merges=None, eos_token_id=None) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if "merges" in line]
    assert len(said) == 1
    assert "no tokenizer.ggml.merges, which its tokenizer needs" in said[0]
    assert train("ids") == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "token_id" in line]
    assert len(said) == 1
    assert said[0].endswith("eos_token_id is 5000, and there are 28 tokens; it is left out")
    tuned = qzo.from_pretrained(tmp_path / "ids" / "model", device="cpu")
    assert (tuned.config.eos_token_id, tuned.config.pad_token_id) == (None, None)


def test_a_byte_that_is_no_token_is_dropped_as_llama_cpp_drops_it():
    file = byte_level("gpt-2")
    file.metadata["tokenizer.ggml.tokens"][LETTERS.index("b")] = "missing"
    assert gguf_tokenizer.load(file).tokenize("abc") == ["a", "c"]

"""`qzo generate`: the tokens of model.generate behind a prompt or a chat, and where they end."""

import io
import json
import shutil
from typing import Any

import pytest
import transformers as t

import qzo
from qzo.cli.main import main
from qzo.kernels import qmm_torch
from qzo.kernels.few_rows import MOST_ROWS
from tests.support import tiny
from tests.support.checkpoints import VOCAB, write_gguf
from tests.support.gguf_tokens import CONTROL, NORMAL, UNKNOWN

PROMPT = "Headline : red one Topic"
MOST = 12
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' and not systems %}{{ raise_exception('no system') }}{% endif %}"
    "{{ m.content }}{{ ' <end> ' if m.role == 'assistant' else ' : ' }}{% endfor %}"
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A 4-bit folder without a chat template."""
    folder = tmp_path_factory.mktemp("generate")
    tiny.save_checkpoint(folder / "float")
    assert main(["quantize", str(folder / "float"), "--output-dir", str(folder / "base"), "--group-size", "32"]) == 0
    return folder / "base"


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    """The folder of a run on it."""
    folder = tmp_path_factory.mktemp("run")
    data = tiny.write_jsonl(folder / "data.jsonl", tiny.RECORDS)
    arguments = ["--data", data, "--output-dir", folder / "out", "--max-steps", 4, "--learning-rate", 0.5, "--clip", 50]
    assert main(["train", *map(str, [base, *arguments])]) == 0
    return folder / "out"


@pytest.fixture(scope="module")
def greedy(base):
    """Ids that transformers' own generate writes behind PROMPT."""
    model, ids = qzo.from_pretrained(base, device="cpu"), qzo.load_tokenizer(base)(PROMPT, return_tensors="pt")
    row = model.generate(ids["input_ids"], max_new_tokens=MOST, do_sample=False)[0]
    return row[ids["input_ids"].shape[1] :].tolist()


def told(capsys, *arguments):
    capsys.readouterr()
    assert main(["generate", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys, *arguments):
    capsys.readouterr()
    assert main(["generate", *map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert not out
    return err.splitlines()[-1]


def ending(base, folder, token, **named):
    """A copy of the folder in which the token is a special one, <end>."""
    shutil.copytree(base, folder)
    words = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = {number: word for word, number in words["model"]["vocab"].items()}
    words["model"]["vocab"] = {"<end>" if number == token else word: number for number, word in vocabulary.items()}
    (folder / "tokenizer.json").write_text(json.dumps(words))
    plain = t.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        **{"eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"} | named,
    )
    plain.add_special_tokens({"additional_special_tokens": ["<end>"]})
    plain.save_pretrained(folder)
    return folder


def first_new(tokens):
    """The place of a token, not the first, that stands nowhere before it."""
    return next(at for at in range(1, len(tokens)) if tokens[at] not in tokens[:at])


def test_greedy_is_models_own_generate(base, greedy, capsys):
    found = told(capsys, base, "--prompt", PROMPT, "--max-new-tokens", MOST, "--device", "cpu")
    assert found["text"] == qzo.load_tokenizer(base).decode(greedy)
    assert len(set(greedy)) > 3
    assert (found["model"], found["steps"], found["prompt"]) == (str(base), 0, PROMPT)
    assert found["tokens"] == len(greedy) == MOST
    assert found["tokens_per_second"] == pytest.approx(found["tokens"] / found["seconds"], rel=0.1)


def test_base_and_journal_write_what_the_saved_model_writes(base, run, capsys):
    ask = ["--prompt", PROMPT, "--max-new-tokens", MOST]
    tuned = told(capsys, run / "model", *ask)
    replayed = told(capsys, base, "--journal", run / "journal.qzo", *ask)
    begun = told(capsys, base, "--journal", run / "journal.qzo", "--until", 0, *ask)
    assert (tuned["steps"], replayed["steps"], begun["steps"]) == (0, 4, 0)
    assert replayed["text"] == tuned["text"]
    assert begun["text"] == told(capsys, base, *ask)["text"] != tuned["text"]


def test_a_token_is_written_without_making_weights(base, capsys, monkeypatch):
    """On a CPU the prompt's rows go through chunks of weights, and no later token's."""
    rows = []
    chunks = qmm_torch.qmm_torch
    monkeypatch.setattr(
        qmm_torch, "qmm_torch", lambda x, *rest, **options: [rows.append(len(x)), chunks(x, *rest, **options)]
    )
    long = " ".join([PROMPT] * 2)
    told(capsys, base, "--prompt", long, "--max-new-tokens", 4, "--device", "cpu")
    assert len(rows) == 14, "layers of the model, once each"
    assert min(rows) > MOST_ROWS


@pytest.mark.parametrize("given", [[], ["--prompt", "-"]])
def test_standard_input_is_read_and_text_is_streamed(base, greedy, capsys, monkeypatch, given):
    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPT + "\n"))
    assert main(["generate", str(base), *given, "--max-new-tokens", str(MOST)]) == 0
    out, err = capsys.readouterr()
    assert out == qzo.load_tokenizer(base).decode(greedy) + "\n"
    assert f"5 tokens read, {MOST} written" in err
    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPT + "\n\n"))
    assert told(capsys, base, *given, "--max-new-tokens", 1)["prompt"] == PROMPT + "\n"


def test_draws_follow_seed_and_top_p(base, greedy, capsys):
    ask = ["--prompt", PROMPT, "--max-new-tokens", MOST, "--temperature", 2]
    one, same, other = (told(capsys, base, *ask, "--seed", seed)["text"] for seed in (1, 1, 2))
    assert one == same != other
    likeliest = qzo.load_tokenizer(base).decode(greedy)
    assert told(capsys, base, *ask, "--top-p", 1e-6)["text"] == likeliest != one


@pytest.mark.parametrize("named", ["template", "tokenizer", "generation_config"])
def test_text_ends_at_any_end_that_the_checkpoint_names(base, greedy, tmp_path, capsys, named):
    """A token of the greedy text becomes the end; nothing of the model changes."""
    at = first_new(greedy)
    if named == "generation_config":
        folder = shutil.copytree(base, tmp_path / "model")
        settings = {"eos_token_id": [2, greedy[at]], "temperature": 0.3, "top_p": 0.5, "do_sample": True}
        (folder / "generation_config.json").write_text(json.dumps(settings))
    else:
        more = {"chat_template": TEMPLATE} if named == "template" else {"eos_token": "<end>"}
        folder = ending(base, tmp_path / "model", greedy[at], **more)
    found = told(capsys, folder, "--prompt", PROMPT, "--max-new-tokens", MOST)
    assert found["tokens"] == at + 1
    kept = greedy[:at] if named != "generation_config" else greedy[: at + 1]  # the word is no special token there
    assert found["text"] == qzo.load_tokenizer(base).decode(kept)


def test_a_chat_goes_through_the_template(base, tmp_path, capsys):
    folder = ending(base, tmp_path / "model", 1, eos_token="<end>", chat_template=TEMPLATE.replace("systems", "true"))
    ask = ["--chat", "red one", "--max-new-tokens", MOST]
    found = told(capsys, folder, *ask, "--system", "blue Topic")
    assert found["prompt"] == "blue Topic : red one : "
    assert found["text"] == told(capsys, base, "--prompt", "blue Topic : red one :", *ask[2:])["text"]
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    said = refused(capsys, folder, *ask, "--system", "blue Topic")
    assert "the chat template refuses messages of the roles system, user" in said


def test_a_gguf_ends_at_its_eos_token(tmp_path, capsys):
    letters = [chr(ord("A") + i) for i in range(VOCAB - 2)]
    words: dict[str, Any] = {
        "tokenizer_model": "llama",
        "token_list": ["<unk>", "<s>", *letters],
        "token_types": [UNKNOWN, CONTROL, *[NORMAL] * len(letters)],
        "token_scores": [0.0] * VOCAB,
        "add_space_prefix": False,
        "add_bos_token": True,
    }
    write_gguf(tmp_path / "m.gguf", tied=False, tokenizer=words.items())
    ask = ["--prompt", "ABC", "--max-new-tokens", MOST]
    whole = told(capsys, tmp_path / "m.gguf", *ask)["text"]
    at = first_new(whole)
    end = words["token_list"].index(whole[at])
    words["token_types"][end] = CONTROL
    write_gguf(tmp_path / "ends.gguf", tied=False, tokenizer={**words, "eos_token_id": end}.items())
    found = told(capsys, tmp_path / "ends.gguf", *ask)
    assert (found["tokens"], found["text"]) == (at + 1, whole[:at])
    assert len(whole) > at + 1
    said = refused(capsys, tmp_path / "m.gguf", "--chat", "ABC")
    assert "m.gguf has no chat template (no tokenizer.chat_template in its metadata)" in said
    assert "--prompt" in said


def test_an_encoder_decoder_model_reads_with_one_and_writes_with_the_other(tmp_path, capsys):
    tiny.save_checkpoint(tmp_path / "t5")
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        (tmp_path / "t5" / name).unlink()
    shape = {"d_model": 64, "d_kv": 32, "d_ff": 128, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    t.T5ForConditionalGeneration(t.T5Config(vocab_size=30, **shape)).save_pretrained(tmp_path / "t5")
    folder = tmp_path / "4bit"
    assert main(["quantize", str(tmp_path / "t5"), "--output-dir", str(folder), "--group-size", "32"]) == 0
    ids = qzo.load_tokenizer(folder)(PROMPT, return_tensors="pt")["input_ids"]
    row = qzo.from_pretrained(folder, device="cpu").generate(ids, max_new_tokens=6, do_sample=False)[0]
    found = told(capsys, folder, "--prompt", PROMPT, "--max-new-tokens", 6)
    assert found["text"] == qzo.load_tokenizer(folder).decode(row[1:], skip_special_tokens=True)
    assert found["tokens"] == len(row) - 1


def test_the_models_places_end_the_text(base, capsys):
    capsys.readouterr()
    assert main(["generate", str(base), "--prompt", "red " * 60, "--max-new-tokens", "9", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["tokens"] == 4
    assert "at most 4 tokens are written, not 9" in err
    said = refused(capsys, base, "--prompt", "red " * 64)
    assert "the prompt has 64 tokens, LlamaForCausalLM has 64 places for prompt and text" in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--prompt", " "], "the prompt of --prompt is empty"),
        (["--chat", ""], "the prompt of --chat is empty"),
        (["--prompt", "-"], "the prompt of standard input is empty"),
        (["--chat", "red"], "base has no chat template (no chat_template.jinja): give the text"),
        (["--prompt", "red", "--system", "blue"], "there is no --chat"),
        (["--prompt", "red", "--until", "2"], "give its journal too, --journal OUT/journal.qzo"),
        (["--prompt", "red", "--max-new-tokens", "0"], "--max-new-tokens 0: expected a number >= 1"),
        (["--prompt", "red", "--temperature", "-1"], "--temperature -1.0: expected a finite number >= 0"),
        (["--prompt", "red", "--top-p", "0.9"], "--top-p 0.9 needs a --temperature above 0"),
        (["--prompt", "red", "--top-p", "1.5", "--temperature", "1"], "--top-p 1.5: expected a number > 0 and <= 1"),
        (["--prompt", "red", "--journal", "none.qzo"], "there is no journal none.qzo"),
    ],
)
def test_bad_input_is_one_line(base, capsys, monkeypatch, options, said):
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    assert said in refused(capsys, base, *options)


def test_a_step_that_the_journal_lacks_and_a_model_that_is_missing(base, run, capsys):
    said = refused(capsys, base, "--prompt", "red", "--journal", run / "journal.qzo", "--until", 5)
    assert said.endswith("journal.qzo has 4 steps")
    assert "a model is missing: qzo generate MODEL" in refused(capsys, "--prompt", "red")


def test_a_model_that_writes_no_text_is_named(tmp_path, capsys):
    tiny.save_checkpoint(tmp_path / "bert")
    for name in ("model.safetensors", "config.json"):
        (tmp_path / "bert" / name).unlink()
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
    t.BertModel(t.BertConfig(**shape, vocab_size=30)).save_pretrained(tmp_path / "bert")
    said = refused(capsys, tmp_path / "bert", "--prompt", "red", "--group-size", 32)
    assert "BertModel writes no text" in said


def test_ctrl_c_ends_the_text_in_one_line(base, capsys, monkeypatch):
    monkeypatch.setattr("qzo.cli.generate.generate", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(["generate", str(base), "--prompt", "red"]) == 130
    assert capsys.readouterr().err.endswith("\nqzo: stopped\n")

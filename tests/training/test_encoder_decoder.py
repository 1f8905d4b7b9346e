"""Encoder-decoder models: loaded, trained and saved like others; losses are transformers' own."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    MBartTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

import qzo
from qzo.cli.main import main
from qzo.training.data import tokenize
from qzo.training.task import Task
from tests.support import tiny

MODELS = {
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=64, d_model=64, d_kv=32, d_ff=128, num_layers=1, num_heads=2, decoder_start_token_id=0)
    ),
    "flan": lambda: T5ForConditionalGeneration(
        T5Config(
            vocab_size=64,
            d_model=64,
            d_kv=32,
            d_ff=128,
            num_layers=1,
            num_heads=2,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
            decoder_start_token_id=0,
        )
    ),
    "bart": lambda: BartForConditionalGeneration(
        BartConfig(
            vocab_size=64,
            d_model=64,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=128,
            decoder_ffn_dim=128,
            max_position_embeddings=64,
        )
    ),
}
LABELS = torch.tensor([[5, 6, 7, 1, -100], [9, 8, 1, -100, -100]])
BATCH = {"input_ids": torch.arange(2, 14).view(2, 6), "labels": LABELS}


@pytest.fixture(params=MODELS)
def model(request, tmp_path):
    MODELS[request.param]().save_pretrained(tmp_path / "float")
    return qzo.from_pretrained(tmp_path / "float", device="cpu", group_size=32)


def test_losses_are_transformers_own(model):
    want = model(input_ids=BATCH["input_ids"], labels=LABELS).loss
    torch.testing.assert_close(qzo.losses(model, BATCH, 1), want[None], rtol=1e-5, atol=1e-6)


def test_a_pair_has_the_losses_of_single_evaluations(model):
    with qzo.evaluating(model, qzo.Evaluations([3, 3], [0.05, -0.05])):
        both = qzo.losses(model, BATCH, 2)
    alone = []
    for coef in (0.05, -0.05):
        with qzo.evaluating(model, qzo.Evaluations([3], [coef])):
            alone.append(qzo.losses(model, BATCH, 1))
    assert both[0] != both[1]
    torch.testing.assert_close(both, torch.cat(alone), rtol=1e-6, atol=0)


def test_it_learns_and_is_saved(model, tmp_path):
    optimizer = qzo.QZO(model, lr=2e-2, directions=4)
    stacked = qzo.pair(BATCH, 8)
    first = float(qzo.losses(model, BATCH, 1))
    for _ in range(12):
        optimizer.step(lambda: qzo.losses(model, stacked, 8))
    assert float(qzo.losses(model, BATCH, 1)) < first
    report = qzo.save_pretrained(model, tmp_path / "out", BATCH)
    again = qzo.from_pretrained(tmp_path / "out", device="cpu")
    assert float(qzo.losses(again, BATCH, 1)) == pytest.approx(report["loss_after"], rel=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"option_ids": torch.tensor([[3, 4], [3, 4]]), "label": torch.tensor([0, 1])}, "has an encoder: options"),
        ({"targets": LABELS}, "packed rows are for decoder-only models"),
    ],
)
def test_what_only_decoders_can_is_refused(model, change, message):
    with pytest.raises(ValueError, match=message):
        qzo.losses(model, BATCH | change, 1)


# ---------------------------------------------------------------------------------------------- lines of text


def save_t5(folder):
    """A small T5 and a tokenizer of words that ends every text with </s>."""
    words = {w: i for i, w in enumerate(["<pad>", "</s>", "<unk>", *tiny.WORDS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    MODELS["flan"]().save_pretrained(folder)
    return words


def test_the_encoder_reads_the_prompt_and_the_decoder_the_completion(tmp_path):
    words = save_t5(tmp_path)
    tokenizer = qzo.load_tokenizer(tmp_path)
    records = [{"prompt": "red green", "completion": "warm cold one"}, {"prompt": "blue", "completion": "cold"}]
    examples = tokenize(records, tokenizer, encoder=True)
    assert [e.ids for e in examples] == [(words["red"], words["green"], 1), (words["blue"], 1)]
    assert [e.labels for e in examples] == [(words["warm"], words["cold"], words["one"], 1), (words["cold"], 1)]
    model = qzo.from_pretrained(tmp_path, device="cpu", group_size=32)
    task = Task(model, examples, 0, packing="auto")
    batch = task.batch([0, 1], 1)
    assert batch["input_ids"].tolist() == [[words["red"], words["green"], 1], [words["blue"], 1, 0]]
    assert batch["labels"].tolist() == [[words["warm"], words["cold"], words["one"], 1], [words["cold"], 1, -100, -100]]
    own = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]).loss
    torch.testing.assert_close(task.losses(batch, 1), own[None], rtol=1e-5, atol=1e-6)
    with pytest.warns(UserWarning, match="1 of 2 lines have more than 2 tokens .* a prompt has lost its end"):
        cut = tokenize([records[1], {"prompt": "red green blue", "completion": "cold"}], tokenizer, 2, encoder=True)
    assert cut[1].ids == (words["red"], 1)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "red"}, "learns from lines of prompt and completion, .*; this one has text"),
        ({"prompt": "red", "options": ["warm", "cold"], "label": 0}, "learns from lines of prompt and completion"),
        ({"prompt": "red", "completion": "one two three four"}, "the completion has 5 tokens, max_length=4"),
        ({"prompt": "", "completion": "one"}, "the text '' has no tokens"),
        (
            {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
            "learns from lines of prompt and completion, .*; this one has completion, prompt of messages",
        ),
    ],
)
def test_lines_that_an_encoder_decoder_model_cannot_learn(tmp_path, record, message):
    save_t5(tmp_path)
    with pytest.raises(ValueError, match=f"example 1: .*{message}"):
        tokenize([record], qzo.load_tokenizer(tmp_path), 4, encoder=True)


def around(single, **special):
    """A tokenizer of letters with what `single` says around a text."""
    vocab = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", "en", *"abcde"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<s>", "</s>", "en"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[(word, vocab[word]) for word in single.split() if word != "$A"]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **special or {"eos_token": "</s>"})


@pytest.mark.parametrize(
    ("single", "source", "target"),
    [
        ("$A </s>", "a b c </s>", "d </s>"),
        ("<s> $A </s>", "<s> a b c </s>", "<s> d </s>"),
        ("en $A </s>", "en a b c </s>", "en d </s>"),
        ("$A </s> en", "a b c </s> en", "d </s> en"),
        ("<s> $A", "<s> a b c", "<s> d </s>"),
        ("$A", "a b c", "d </s>"),
    ],
)
def test_special_tokens_stand_once_around_each_text(single, source, target):
    tokenizer = around(single)
    end = target.partition("d")[2].replace(" en", "")
    for prompt, completion in (("a b c", "d"), (source, "d"), ("a b c", f"d{end}"), (source, target)):
        [example] = tokenize([{"prompt": prompt, "completion": completion}], tokenizer, encoder=True)
        assert tokenizer.convert_ids_to_tokens(example.ids) == source.split()
        assert tokenizer.convert_ids_to_tokens(example.labels) == target.split()
    for prompt in ("a b c d e", source.replace("c", "c d e")):
        with pytest.warns(UserWarning, match="a prompt has lost its end"):
            [example] = tokenize([{"prompt": prompt, "completion": "d"}], tokenizer, len(source.split()), encoder=True)
        assert tokenizer.convert_ids_to_tokens(example.ids) == source.split()


def test_no_room_for_a_prompt():
    with pytest.raises(ValueError, match="example 1: max_length=2 leaves no token of the prompt beside the 2 that"):
        tokenize([{"prompt": "a b", "completion": "d"}], around("<s> $A </s>"), 2, encoder=True)


def test_a_target_has_its_own_language_behind_its_end():
    """mBART's decoder begins with the token that ends its labels."""
    pieces = [
        ("<s>", 0.0),
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        ("\u2581a", -1.0),
        ("\u2581b", -1.0),
        ("<mask>", 0.0),
    ]
    tokenizer = MBartTokenizer(vocab=pieces, src_lang="en_XX", tgt_lang="de_DE")
    [example] = tokenize([{"prompt": "a", "completion": "b"}], tokenizer, encoder=True)
    assert tokenizer.convert_ids_to_tokens(example.ids) == ["\u2581a", "</s>", "en_XX"]
    assert tokenizer.convert_ids_to_tokens(example.labels) == ["\u2581b", "</s>", "de_DE"]


def test_it_trains_from_the_command_line(tmp_path, capsys):
    save_t5(tmp_path / "m")
    data = tiny.write_jsonl(
        tmp_path / "train.jsonl",
        [{"prompt": f"{a} {b}", "completion": b} for a in tiny.WORDS[:4] for b in ("warm", "cold")],
    )
    arguments = [
        "train",
        "--model",
        str(tmp_path / "m"),
        "--data",
        str(data),
        "--output-dir",
        str(tmp_path / "out"),
        "--max-steps",
        "3",
        "--batch-size",
        "4",
        "--group-size",
        "32",
        "--device",
        "cpu",
    ]
    assert main(arguments) == 0
    assert (tmp_path / "out/model/model.safetensors").is_file()
    capsys.readouterr()
    assert main([*arguments[:6], str(tmp_path / "other"), *arguments[7:], "--train-layers", "1"]) == 2
    assert "has an encoder before its decoder: train it whole" in capsys.readouterr().err

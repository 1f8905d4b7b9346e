"""Text generated under stacked evaluations, and measures of it as losses."""

import pytest
import torch
from tokenizers import processors
from transformers import BartConfig, BartForConditionalGeneration

import qzo
from tests.support import tiny

PROMPTS = ["Headline : red one two", "Headline : sky", "blue"]
E, MORE = 4, {"max_new_tokens": 8}
EVALUATIONS = qzo.Evaluations([1, 1, 2, 2], [0.3, -0.3, 0.3, -0.3])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.save_checkpoint(tmp_path_factory.mktemp("base"))


@pytest.fixture
def model(base):
    return qzo.from_pretrained(base, device="cpu", group_size=32)


@pytest.fixture
def tokenizer(base):
    return qzo.load_tokenizer(base)


def alone(model, tokenizer, **options):
    """The replies as `generate` gives them to one prompt under one evaluation at a time."""
    texts = []
    for e in range(E):
        for prompt in PROMPTS:
            ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
            with torch.no_grad(), qzo.evaluating(model, EVALUATIONS[e : e + 1]):
                out = model.generate(ids, do_sample=False, **options)
            texts.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    return texts


@pytest.mark.parametrize("options", [MORE, {**MORE, "num_beams": 2}, {**MORE, "use_cache": False}], ids=str)
def test_replies_are_those_of_each_evaluation_alone(model, tokenizer, options):
    want = alone(model, tokenizer, **options)
    with qzo.evaluating(model, EVALUATIONS):
        found = qzo.generate_texts(model, tokenizer, PROMPTS, E, **options)
    assert found == want
    assert len({tuple(found[e * 3 : e * 3 + 3]) for e in range(E)}) == E, "evaluations that differ reply alike"
    assert qzo.generate_texts(model, tokenizer, PROMPTS, 2, **options)[:3] != found[:3]


def test_what_a_tokenizer_puts_behind_a_text_is_left_out(model, tokenizer):
    want = qzo.generate_texts(model, tokenizer, PROMPTS, 1, **MORE)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", 1)]
    )
    assert tokenizer("blue")["input_ids"][-1] == tokenizer.eos_token_id
    tokenizer.pad_token = None
    assert qzo.generate_texts(model, tokenizer, PROMPTS, 1, return_dict_in_generate=True, **MORE) == want


def test_dropout_is_off_and_the_mode_stays(model, tokenizer):
    want = qzo.generate_texts(model, tokenizer, PROMPTS, 2, **MORE)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.9
    model.train()
    assert qzo.generate_texts(model, tokenizer, PROMPTS, 2, **MORE) == want
    assert model.training


def test_an_encoder_decoder_replies_to_prompts_of_any_length(tmp_path, tokenizer):
    torch.manual_seed(0)
    shape = dict(d_model=64, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64, init_std=0.5)
    heads = dict(encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2)
    tokens = dict(vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=1, bos_token_id=2, decoder_start_token_id=2)
    config = BartConfig(**shape, **heads, **tokens, forced_eos_token_id=None)
    BartForConditionalGeneration(config).save_pretrained(tmp_path)
    model = qzo.from_pretrained(tmp_path, device="cpu", group_size=32)
    found = qzo.generate_texts(model, tokenizer, PROMPTS, 2, **MORE)
    singly = [qzo.generate_texts(model, tokenizer, [prompt], 1, **MORE)[0] for prompt in PROMPTS]
    assert found == singly * 2
    assert len(set(singly)) == 3


@pytest.mark.parametrize(("prompts", "said"), [([], "there is no prompt"), (["red", ""], "prompt 1 has no tokens")])
def test_prompts_that_are_none(model, tokenizer, prompts, said):
    with pytest.raises(ValueError, match=said):
        qzo.generate_texts(model, tokenizer, prompts, 2, **MORE)


def test_a_measure_is_taken_of_each_evaluations_rows():
    seen = []

    def first(part):
        seen.append(part)
        return part[0]

    values = torch.arange(6.0).view(6, 1)
    assert torch.equal(qzo.objective(first, values, 3), torch.tensor([0.0, 2.0, 4.0]))
    assert [part.tolist() for part in seen] == [[[0.0], [1.0]], [[2.0], [3.0]], [[4.0], [5.0]]]
    found = qzo.objective(lambda texts: [text == "a" for text in texts], ["a", "b", "a", "a"], 2, maximize=True)
    assert torch.equal(found, torch.tensor([-0.5, -1.0]))
    assert found.dtype == torch.float32
    assert qzo.objective(len, ("a", "b"), 1).tolist() == [2.0]


@pytest.mark.parametrize(
    ("metric", "outputs", "error", "said"),
    [
        (len, ["a"] * 3, ValueError, "the outputs have 3 rows, which 2 evaluations do not divide; use qzo.pair"),
        (len, [], ValueError, "the outputs have 0 rows"),
        (len, {"logits": 1}, TypeError, "outputs must be a tensor or a list, .*; got dict"),
        (lambda part: None, ["a"] * 2, TypeError, "a metric returns a number, or one for each row; got NoneType"),
        (lambda part: part, ["a"] * 2, TypeError, "a metric returns a number, or one for each row; got list"),
    ],
)
def test_what_cannot_be_measured(metric, outputs, error, said):
    with pytest.raises(error, match=said):
        qzo.objective(metric, outputs, 2)


def test_a_metric_that_is_nan_skips_the_step(model):
    optimizer = qzo.QZO(model, lr=1e-2, directions=2)
    before = qzo.scales(model)
    with pytest.warns(UserWarning, match="step 0 had a NaN or infinite loss .* what the closure computes"):
        optimizer.step(lambda: qzo.objective(lambda part: float("nan"), ["a"] * 4, 4))
    assert optimizer.last is not None
    assert optimizer.last.skipped
    assert all(torch.equal(before[name], scale) for name, scale in qzo.scales(model).items())

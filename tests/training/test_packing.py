"""Packed rows against plain ones: the same losses for every evaluation, or a model refused by name."""

import json
import random
import warnings

import pytest
import torch
import transformers

import qzo
from qzo.cli.main import main
from qzo.loss.losses import Stacked, model_inputs, option_scores, read_states
from qzo.nn.layers import arena_of, layers
from qzo.training import packing, task
from qzo.training.data import Example, collate
from qzo.training.loop import choose_layers
from qzo.training.task import Task
from tests.support import tiny
from tests.support.journals import read_whole

VOCABULARY = 61
SMALL = dict(
    vocab_size=VOCABULARY,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
ROTARY = dict(**SMALL, intermediate_size=96, num_key_value_heads=1, initializer_range=0.3)
FAMILIES = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**ROTARY)),
    "qwen": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**ROTARY, head_dim=32)),
    "opt": lambda: transformers.OPTForCausalLM(
        transformers.OPTConfig(**SMALL, ffn_dim=96, word_embed_proj_dim=64, init_std=0.3, dropout=0.0)
    ),
}


def made(build, attention="sdpa"):
    torch.manual_seed(0)
    model = build().eval()
    model.set_attn_implementation(attention)
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return qzo.quantize_(made(FAMILIES[request.param]), group_size=32)


@pytest.fixture(scope="module")
def llama():
    return qzo.quantize_(made(FAMILIES["llama"]), group_size=32)


def examples_of(kind, count=5, longest=14):
    """Examples of unequal lengths; kind: labels, one (token an option), several."""
    rng = random.Random(kind)

    def ids(n):
        return tuple(rng.randrange(3, VOCABULARY) for _ in range(n))

    lengths = [2, longest, *(rng.randrange(3, longest) for _ in range(count - 2))]
    if kind == "labels":
        return [Example(i, labels=(-100,) * (len(i) // 2) + i[len(i) // 2 :]) for i in map(ids, lengths)]
    options = (1, 1, 1) if kind == "one" else (3, 1, 2)
    return [Example(ids(n), options=tuple(map(ids, options)), label=rng.randrange(3)) for n in lengths]


def tokens_run(model, run):
    """How many tokens the model's embedding sees in run()."""
    seen = []
    embedding = model.get_input_embeddings()
    hook = embedding.register_forward_hook(lambda _, args, out: seen.append(args[0].numel()))
    try:
        run()
    finally:
        hook.remove()
    return sum(seen)


# --------------------------------------------------------------------------------------------------- the form


def test_who_sees_whom_by_a_plain_loop(llama):
    """Token i sees token j, in a row of two examples, when j stands before it in its example, in no option but
    i's."""
    first, second = (Example((5,) * n, options=((6, 6), (7,), (8, 8, 8)), label=0) for n in (3, 2))
    batch = packing.packed_batch([first, second], 0, join=True)
    owner = [
        (example, option)
        for example, prompt in ((0, 3), (1, 2))
        for option, n in ((None, prompt), (0, 2), (1, 1), (2, 3))
        for _ in range(n)
    ]
    mask = model_inputs(llama, batch)["attention_mask"]
    assert mask.shape == (1, 1, 17, 17)
    for i, (example, option) in enumerate(owner):
        for j, (other, shown) in enumerate(owner):
            sees = j <= i and other == example and shown in (None, option)
            assert (mask[0, 0, i, j] == 0) == sees
            assert sees or mask[0, 0, i, j] == torch.finfo(torch.float32).min
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 3, 3, 4, 5, 0, 1, 2, 3, 2, 2, 3, 4]]
    assert batch["sources"].tolist() == [[2, 3, 2, 2, 6, 7, 10, 11, 10, 10, 14, 15]]
    assert batch["targets"].tolist() == [[6, 6, 7, 8, 8, 8] * 2]
    assert batch["slots"].tolist() == [[0, 0, 1, 2, 2, 2, 3, 3, 4, 5, 5, 5]]


def test_padding_sees_itself_only(llama):
    batch = packing.packed_batch(examples_of("several", 2), 0)
    short = int(batch["seen_until"][0, 0])
    mask = model_inputs(llama, batch)["attention_mask"]
    assert mask.shape == (2, 1, 20, 20)
    assert torch.equal(mask[0, 0, short:] == 0, torch.eye(20, dtype=torch.bool)[short:])


# -------------------------------------------------------------------------------------------- the same losses


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("kind", "join"), [("labels", True), ("one", True), ("several", False), ("several", True)])
def test_every_evaluation_has_the_loss_of_plain_rows(model, kind, join, attention):
    examples = examples_of(kind)
    model.set_attn_implementation(attention)
    plain, packed = collate(examples, 0), packing.packed_batch(examples, 0, join=join)
    with qzo.evaluating(model, qzo.Evaluations([1, 1, 2, 3], [0.2, -0.2, 0.1, 0.0])):
        want, got = qzo.losses(model, plain, 4), qzo.losses(model, packed, 4)
    assert torch.allclose(got, want, rtol=3e-6)
    assert want.sort()[0].diff().min() > 1e-3, "the evaluations could be exchanged"
    one, other = (read_states(model, batch) for batch in (plain, packed))
    assert torch.allclose(one, other, atol=1e-4)
    if kind != "labels":
        one, other = (option_scores(model, Stacked(batch)) for batch in (plain, packed))
        assert torch.allclose(one, other, atol=3e-5)
    assert packing.why_not(model, examples, 0) is None


def test_each_example_alone_has_its_own_loss(llama):
    """Not only the mean: a batch of one, joined with others, is read at its own places."""
    examples = examples_of("several")
    together = option_scores(llama, packing.packed_batch(examples, 0, join=True))
    for example, scores in zip(examples, together, strict=True):
        assert torch.allclose(option_scores(llama, collate([example], 0))[0], scores, atol=3e-5)


def test_the_prompt_runs_once_and_padding_not_at_all(llama):
    examples = examples_of("several")
    prompts, options = sum(len(e.ids) for e in examples), 6 * len(examples)
    here = Task(llama, examples, 0, packing="auto")
    assert here.settle() == (True, True)
    assert tokens_run(llama, here.closure(range(5), 1)) == prompts + options
    here.joins = False
    assert tokens_run(llama, here.closure(range(5), 2)) == 2 * 5 * (14 + 6)
    here.shares = False
    assert tokens_run(llama, here.closure(range(5), 2)) == 2 * 5 * 3 * (14 + 3)


# ------------------------------------------------------------------------------------------------------ tasks


@pytest.mark.parametrize("kind", ["labels", "one", "several"])
@pytest.mark.parametrize("train_layers", [None, 1])
def test_tasks_measure_the_same_in_every_form(llama, kind, train_layers):
    examples = examples_of(kind, 9)
    prefix = choose_layers(llama, train_layers)
    plain, packed = Task(llama, examples, 0, prefix), Task(llama, examples, 0, prefix, "auto")
    plain.shares = False
    assert packed.settle() == (kind == "several", True)
    one, other = plain.evaluate(4), packed.evaluate(4)
    assert other["loss"] == pytest.approx(one["loss"], rel=3e-6)
    assert other["accuracy"] == one["accuracy"]
    if kind != "labels":
        assert torch.allclose(packed.scores(4), plain.scores(4), atol=1e-4)
    evaluations = qzo.Evaluations([1, 1, 2], [0.2, -0.2, 0.0])
    for indices in ([3, 1, 0, 7], [0, 1], [1, 1, 1]):
        runs = [each.closure(indices, 3) for each in (plain, packed)]
        with qzo.evaluating(llama, evaluations):
            want, got = (run() for run in runs)
        assert torch.allclose(got, want, rtol=1e-5)
        alone = packed.closure(indices, 1)
        with qzo.evaluating(llama, evaluations[1:2]):
            assert torch.allclose(alone(), got[1:2], rtol=1e-5)
    choose_layers(llama, None)


def test_options_of_one_and_of_several_tokens_in_one_task(llama):
    """Batches of one kind or the other, or both, from one cache of prefix states."""
    examples = [*examples_of("one", 4), *examples_of("several", 4)]
    prefix = choose_layers(llama, 1)
    want = Task(llama, examples, 0).scores(8)
    for shares in (False, True):
        here = Task(llama, examples, 0, prefix)
        here.shares = shares
        for size in (1, 3, 8):
            got = here.scores(size)
            assert torch.allclose(got.log_softmax(1), want.log_softmax(1), atol=3e-5)
    choose_layers(llama, None)


def test_what_needs_no_packing_is_not_tried(llama):
    for kind in ("labels", "one"):
        assert tokens_run(llama, Task(llama, examples_of(kind), 0).settle) == 0
    with pytest.raises(ValueError, match="packing='on': known are off, auto"):
        Task(llama, examples_of("one"), 0, packing="on")


# ----------------------------------------------------------------------------------------- models that cannot


def sliding(window):
    config = transformers.MistralConfig(**ROTARY, sliding_window=window)
    return lambda: transformers.MistralForCausalLM(config)


REFUSED = {
    "alibi": (
        lambda: transformers.BloomForCausalLM(
            transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=64, n_layer=2, n_head=2, initializer_range=0.3)
        ),
        "refuses them",
    ),
    "recurrent": (
        lambda: transformers.MambaForCausalLM(
            transformers.MambaConfig(vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, state_size=8)
        ),
        "refuses them",
    ),
    "sliding window": (sliding(6), "hidden states come out .* apart"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_computes_something_else_keeps_plain_rows(name):
    build, said = REFUSED[name]
    model, examples = made(build, "eager"), examples_of("several")
    here = Task(model, examples, 0, packing="auto")
    with pytest.warns(UserWarning, match=f"runs without packed rows: .*{said}") as told:
        scores = here.scores()
    assert len(told) == 1
    assert (here.shares, here.joins) == (False, False)
    plain = collate(sorted(examples, key=lambda e: len(e.ids)), 0)
    assert torch.equal(scores.sort(0)[0], option_scores(model, plain).sort(0)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it was said
        here.closure([0, 1], 2)()


def test_a_window_longer_than_the_longest_example_is_no_matter():
    assert packing.why_not(made(sliding(18)), examples_of("several"), 0) is None
    assert packing.why_not(made(sliding(13)), examples_of("several"), 0) is not None


def test_kernels_that_take_no_mask_are_not_tried(llama):
    llama.config._attn_implementation = "flash_attention_2"
    try:
        assert "takes no mask" in str(packing.why_not(llama, examples_of("labels"), 0))
    finally:
        llama.config._attn_implementation = "sdpa"


# -------------------------------------------------------------------------------------------------- the price


def test_it_is_done_where_it_pays():
    assert not packing.joining_pays([50] * 8)  # nothing to save
    assert not packing.joining_pays([49] + [50] * 7)  # less than attention costs
    assert packing.joining_pays([10] * 7 + [50])
    assert not packing.joining_pays([1000] * 4 + [4000])  # the mask would be too large
    prompt, word = (3,) * 40, (4,) * 3
    assert packing.sharing_pays([Example(prompt, options=(word,) * 4, label=0)])
    assert packing.sharing_pays([Example(prompt[:1], options=(word, word[:2]), label=0)])
    assert not packing.sharing_pays([Example(prompt[:1], options=(word * 20,) * 40, label=0)])


def test_rows_that_are_cheaper_than_sharing_stay_rows(llama):
    rng = random.Random(0)
    examples = [
        Example(
            (5,),
            label=0,
            options=tuple(tuple(rng.randrange(3, VOCABULARY) for _ in range(n)) for n in (40, 40, 1) * 10),
        )
        for _ in range(2)
    ]
    prefix = choose_layers(llama, 1)
    here = Task(llama, examples, 0, prefix, "auto")
    assert here.settle() == (False, False)
    assert torch.allclose(here.scores(), Task(llama, examples, 0).scores(), atol=3e-5)
    choose_layers(llama, None)


# -------------------------------------------------------------------------------------------------- qzo train


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.save_checkpoint(tmp_path_factory.mktemp("base"))


def trained(base, tmp_path, name, *more, records=None):
    """The losses of a run's steps."""
    records = records or [
        {"prompt": "red " * (1 + i % 9) + record["prompt"], "completion": "warm cold up"[: 4 + i % 9]}
        for i, record in enumerate(tiny.RECORDS)
    ]
    data = tiny.write_jsonl(tmp_path / "train.jsonl", records)
    status = main(
        [
            "train",
            "--model",
            str(base),
            "--data",
            str(data),
            "--output-dir",
            str(tmp_path / name),
            "--group-size",
            "32",
            "--device",
            "cpu",
            "--max-steps",
            "6",
            "--batch-size",
            "6",
            "--directions",
            "2",
            "--learning-rate",
            "0.02",
            *more,
        ]
    )
    assert status == 0
    return [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("more", [[], ["--train-layers", "1"], ["--sequential"]])
def test_train_with_packing_learns_the_same(base, tmp_path, monkeypatch, more):
    joined = []
    real = packing.joined
    monkeypatch.setattr(packing, "joined", lambda *a: joined.append(1) or real(*a))
    want = trained(base, tmp_path, "off", *more)
    assert not joined
    assert trained(base, tmp_path, "auto", "--packing", "auto", *more) == pytest.approx(want, rel=1e-5)
    assert len(joined) > 2
    assert want[0] != want[-1]


def test_packing_is_in_the_journal_and_resumes_in_the_same_bits(base, tmp_path, capsys, monkeypatch):
    decided_on = []
    real = task.why_not

    def why_not(model, *rest):
        decided_on.append(arena_of(model).data.clone())
        return real(model, *rest)

    monkeypatch.setattr(task, "why_not", why_not)
    trained(base, tmp_path, "out", "--packing", "auto")
    path = tmp_path / "out" / "journal.qzo"
    whole = path.read_bytes()
    assert read_whole(path)[0]["recipe"]["packing"] == "auto"
    path.write_bytes(whole[: -3 * 64 - 7])
    with pytest.raises(AssertionError):
        trained(base, tmp_path, "out", "--resume")
    assert "packing" in capsys.readouterr().err
    trained(base, tmp_path, "out", "--packing", "auto", "--resume")
    assert path.read_bytes() == whole
    assert len(decided_on) == 2
    assert torch.equal(*decided_on), "a resumed run decided on other scales"


def test_train_with_options_of_several_tokens(base, tmp_path):
    records = [{**record, "options": ["warm up", "cold"]} for record in tiny.RECORDS]
    losses = trained(base, tmp_path, "several", "--train-layers", "1", records=records)
    assert all(0 < loss < 5 for loss in losses)
    assert len(set(losses)) == len(losses)
    assert layers(qzo.from_pretrained(tmp_path / "several" / "model", device="cpu"))

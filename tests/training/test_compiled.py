"""The body through torch.compile: the same losses, nothing compiled anew for a new seed, and plain code where it fails.

The compiler's back end is a counter that runs what dynamo traced, so the bits are those of the plain model; another
test goes the whole way through inductor.
"""

import copy
import warnings

import pytest
import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

import qzo
from qzo.training import data
from qzo.training import loop as train
from qzo.training.compiled import Compiled
from qzo.training.settings import Settings
from qzo.training.task import Task
from tests.support import tiny
from tests.support.attention import key_heads
from tests.support.journals import read_whole


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    # a trace has masks where the plain model has none
    folder = tiny.save_checkpoint(tmp_path_factory.mktemp("base"), key_heads=key_heads())
    model = qzo.from_pretrained(folder, group_size=32, device="cpu")
    return model, data.tokenize(tiny.RECORDS, qzo.load_tokenizer(folder))


@pytest.fixture(autouse=True)
def _forget():
    torch.compiler.reset()


class Counter:
    """A back end that runs graphs as they are."""

    def __init__(self):
        self.compiled = 0

    def __call__(self, module, _):
        self.compiled += 1
        return module.forward


def both(task, step):
    """Losses of a step's batch under its own seed, plain and compiled."""
    batch = task.batch([step, step + 1, step + 2], 2)
    with qzo.evaluating(task.model, qzo.Evaluations([step, step], [0.1, -0.1])):
        return task.losses(batch, 2), task.compiled_losses(batch, 2)


@pytest.mark.parametrize("top", [None, 1])
def test_new_seeds_batches_and_scales_compile_nothing(loaded, top):
    model, counter = copy.deepcopy(loaded[0]), Counter()
    prefix = train.choose_layers(model, top)
    task = Task(model, loaded[1], 0, prefix, bucketed=True, compiled=Compiled(model, counter))
    assert torch.equal(*both(task, 0))
    first = counter.compiled
    assert first > 0
    optimizer = qzo.QZO(model, lr=0.1)
    for step in range(1, 4):
        plain, compiled = both(task, step)
        assert torch.equal(plain, compiled)
        assert plain[0] != plain[1]
        optimizer.step(lambda: torch.tensor([1.0, 0.0]))
    assert counter.compiled == first
    short = Task(
        model,
        [data.Example(e.ids[:2], options=e.options, label=e.label) for e in loaded[1]],
        0,
        prefix,
        compiled=task.compiled,
    )
    assert torch.equal(*both(short, 0))
    assert counter.compiled > first  # another shape has code of its own


def test_nothing_is_left_behind(loaded):
    model = copy.deepcopy(loaded[0])
    compiled = Compiled(model, Counter())
    with compiled.body():
        assert "forward" in vars(model.base_model)
    assert not any("forward" in vars(module) for module in model.modules())
    own = model.base_model.forward = model.base_model.forward  # as accelerate's hooks set it
    with compiled.body():
        assert model.base_model.forward is not own
    assert model.base_model.forward is own


def test_where_the_compiler_fails_one_warning_says_where_and_the_model_runs(loaded):
    def fails(module, _):
        raise ValueError("no such instruction")

    model = copy.deepcopy(loaded[0])
    task = Task(model, loaded[1], 0, bucketed=True, compiled=Compiled(model, fails))
    with pytest.warns(UserWarning, match="compile: the compiler failed in LlamaModel .*no such instruc.*uncompiled"):
        assert torch.equal(*both(task, 0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(*both(task, 1))


class Reads(nn.Module):
    def forward(self, x):
        return x + 1 if x.sum() > 0 else x


def test_code_that_cannot_be_traced_runs_between_compiled_pieces(loaded):
    model, counter = copy.deepcopy(loaded[0]), Counter()
    model.base_model.layers[0].mlp.act_fn = Reads()
    task = Task(model, loaded[1], 0, bucketed=True, compiled=Compiled(model, counter))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(*both(task, 0))
    assert counter.compiled > 0


def test_errors_of_the_model_are_its_own(loaded):
    model = copy.deepcopy(loaded[0])
    task = Task(model, loaded[1], 0, bucketed=True, compiled=Compiled(model, Counter()))
    batch = task.batch([0, 1, 2], 1)
    with (
        qzo.evaluating(model, qzo.Evaluations([1, 1], [0.1, -0.1])),
        warnings.catch_warnings(action="error"),
        pytest.raises(ValueError, match="3 rows do not divide into 2 evaluations"),
    ):
        task.compiled_losses(batch, 1)


def test_a_journal_says_that_a_run_was_compiled(loaded, tmp_path):
    """And inductor compiles it: the losses are those of the plain run but for rounding, twice the same bits."""
    ends = []
    for name in ("a", "b", "plain"):
        model = copy.deepcopy(loaded[0])
        settings = Settings(max_steps=2, batch_size=2, directions=1, compile=name != "plain")
        task = Task(
            model,
            loaded[1],
            0,
            train.choose_layers(model, 1),
            bucketed=True,
            compiled=Compiled(model) if settings.compile else None,
        )
        train.fit(task, settings, tmp_path / name, show=False)
        ends.append(read_whole(tmp_path / name / "journal.qzo"))
    (header, steps, _), (_, again, _), (other, plain, _) = ends
    assert header["recipe"]["compile"] is True
    assert "compile" not in other["recipe"]
    assert steps == again
    assert [r.loss_plus for [r] in steps] == pytest.approx([r.loss_plus for [r] in plain], rel=1e-3)


def test_experts_are_not_compiled_for_each_number_of_rows():
    config = MixtralConfig(
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    torch.manual_seed(0)
    model, counter = qzo.quantize_(MixtralForCausalLM(config).eval(), group_size=32), Counter()
    compiled, numbers = Compiled(model, counter), set()
    for step in range(3):
        batch = {"input_ids": torch.randint(0, 64, (2, 9)), "labels": torch.randint(0, 64, (2, 9))}
        with qzo.evaluating(model, qzo.Evaluations([step, step], [0.1, -0.1])):
            plain = qzo.losses(model, batch, 2)
            with compiled.body():
                assert torch.equal(qzo.losses(model, batch, 2), plain)
        numbers.add(counter.compiled)
    assert len(numbers) == 1


@pytest.mark.gpu
def test_a_compiled_run_on_a_gpu_has_the_same_bits_in_graphs(loaded, tmp_path):
    ends = []
    for choice in (False, None):
        model = copy.deepcopy(loaded[0]).cuda().half()
        settings = Settings(max_steps=6, batch_size=2, directions=1, compile=True, cuda_graph=choice)
        task = Task(model, loaded[1], 0, train.choose_layers(model, 1), compiled=Compiled(model))
        train.fit(task, settings, tmp_path / f"{choice}", show=False)
        ends.append((tmp_path / f"{choice}" / "journal.qzo").read_bytes())
    assert ends[0] == ends[1]


def test_compile_is_a_bool():
    with pytest.raises(ValueError, match="compile='inductor': expected true or false"):
        Settings(compile="inductor")  # type: ignore[arg-type]

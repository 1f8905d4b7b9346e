"""Runs of QZOTrainer: resumed, paired, accumulated, scheduled, evaluated, saved; what may not change a bit of them."""

import copy
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainerCallback
from transformers.optimization import get_cosine_schedule_with_warmup

import qzo
from qzo.kernels.noise import kernel_coefs, law_number
from qzo.nn.layers import arena_of
from qzo.trainer import QZOTrainer
from tests.support import ranks, trainers
from tests.support.journals import read_whole
from tests.support.trainers import losses_of, rows, scales, trained

pytestmark = trainers.needs_accelerate


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return trainers.loaded(tmp_path_factory.mktemp("base"))[0]


@pytest.fixture(scope="module")
def plain(base, tmp_path_factory):
    """The run that others are compared with."""
    return trained(base, tmp_path_factory.mktemp("plain"))


class Own(QZOTrainer):
    """A compute_loss of one's own: the model's loss and a penalty on its logits."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs, num_items_in_batch=num_items_in_batch)
        loss = outputs.loss + 1e-3 * outputs.logits.square().mean()
        return (loss, outputs) if return_outputs else loss


class Through(QZOTrainer):
    """The model's own loss, from its own whole forward."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)


# ------------------------------------------------------------------------------------------------ bits


def test_a_resumed_run_ends_in_the_bits_of_the_unbroken(base, plain):
    out = Path(plain.args.output_dir)
    whole = (out / "journal.qzo").read_bytes()
    (out / "journal.qzo").write_bytes(whole[:-40])  # killed at step 5, in a record
    again = trained(base, out, resume=out / "checkpoint-3")
    assert torch.equal(scales(again), scales(plain))
    assert not torch.equal(scales(again), arena_of(base).data)
    assert (out / "journal.qzo").read_bytes() == whole
    assert (out / "checkpoint-6" / "journal.qzo").read_bytes() == whole
    assert losses_of(again) == losses_of(plain)


def test_base_and_journal_are_the_model(base, plain):
    model = copy.deepcopy(base)
    assert qzo.replay(model, Path(plain.args.output_dir) / "journal.qzo") == 6
    assert torch.equal(arena_of(model).data, scales(plain))


@pytest.mark.parametrize(
    ("kind", "directions", "batch", "one_sided"),
    [
        (QZOTrainer, 1, 4, False),
        (QZOTrainer, 3, 1, False),
        (QZOTrainer, 3, 2, True),
        (Own, 1, 1, False),
        (Own, 3, 3, False),
        (Own, 3, 1, True),
    ],
)
def test_paired_and_in_turn_have_the_same_bits(kind, directions, batch, one_sided, base, tmp_path):
    found = {}
    for paired in (True, False):
        run = trained(
            base,
            tmp_path / str(paired),
            kind,
            changes={"per_device_train_batch_size": batch, "max_steps": 3, "save_strategy": "no"},
            paired=paired,
            directions=directions,
            one_sided=one_sided,
        )
        found[paired] = scales(run), losses_of(run)
    assert torch.equal(found[True][0], found[False][0])
    assert found[True][1] == found[False][1]
    assert len(set(found[True][1])) == 3


def test_a_custom_loss_is_what_is_minimized(base, plain, tmp_path):
    own = trained(base, tmp_path, Own, changes={"save_strategy": "no"})
    assert losses_of(own)[0] > losses_of(plain)[0] + 1e-4  # by the penalty
    assert not torch.equal(scales(own), scales(plain))


@pytest.mark.parametrize(
    "settings", [{"label_smoothing_factor": 0.1}, {}], ids=["label smoothing", "compute_loss_func"]
)
def test_other_losses_of_transformers_in_pairs(settings, base, plain, tmp_path):
    def wrong(outputs, labels, num_items_in_batch=None):
        """One minus the mean probability of the labels."""
        ids = labels[:, 1:].clamp(min=0)[..., None]
        return 1 - outputs.logits[:, :-1].softmax(-1).gather(-1, ids).mean()

    changes = {"max_steps": 2, "save_strategy": "no", **settings}
    extra = {} if settings else {"compute_loss_func": wrong}
    runs = [trained(base, tmp_path / str(p), changes=changes, paired=p, **extra) for p in (True, False)]
    assert torch.equal(scales(runs[0]), scales(runs[1]))
    assert losses_of(runs[0]) == losses_of(runs[1])
    assert losses_of(runs[0]) != pytest.approx(losses_of(plain)[:2], rel=1e-4)


def test_two_ranks_have_the_bits_of_one_process(base, tmp_path):
    """At equal global batch and order of summation: rank 1's batch is the second micro-batch."""
    told = ranks.run(tmp_path / "ranks", 2, trainers.rank, base, str(tmp_path / "two"))
    assert sorted(line["rank"] for line in told) == [0, 1]
    assert [line["ranks"] for line in told] == [2, 2]
    assert sum(line["journal"] is not None for line in told) == 1
    changes = {"max_steps": 4, "save_strategy": "no", "per_device_train_batch_size": 2}
    one = trained(base, tmp_path / "one", changes={**changes, "gradient_accumulation_steps": 2})
    assert {line[run] for line in told for run in ("whole", "resumed")} == {trainers.digest(one)}


def test_one_sided_steps_are_those_of_qzo_and_resume(base, tmp_path):
    """An evaluation a direction, over two micro-batches a step; killed, and resumed from a checkpoint."""
    changes = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    one_sided = {"directions": 3, "one_sided": True}
    whole = trained(base, tmp_path, changes=changes, **one_sided)
    journal = (tmp_path / "journal.qzo").read_bytes()
    header, steps, _ = read_whole(tmp_path / "journal.qzo")
    assert header["recipe"] == {"trainer": "transformers", "paired": True, "one_sided": True}
    for records in steps:
        losses = [record.loss_plus for record in records]
        others = [(sum(losses) - loss) / 2 for loss in losses]
        assert [record.loss_minus for record in records] == pytest.approx(others, rel=1e-6)
    largest = [max(abs(r.loss_plus - r.loss_minus) for r in records) / 1e-2 for records in steps]
    logged = [line["grad_norm"] for line in whole.state.log_history if "grad_norm" in line]
    assert logged == pytest.approx(largest, rel=1e-3)
    model = copy.deepcopy(base)
    qzo.replay(model, tmp_path / "journal.qzo")
    assert torch.equal(arena_of(model).data, scales(whole))

    (tmp_path / "journal.qzo").write_bytes(journal[:-40])
    again = trained(base, tmp_path, resume=tmp_path / "checkpoint-2", changes=changes, **one_sided)
    assert (tmp_path / "journal.qzo").read_bytes() == journal
    assert torch.equal(scales(again), scales(whole))
    with pytest.raises(ValueError, match="one_sided"):
        trained(base, tmp_path, resume=tmp_path / "checkpoint-2", changes=changes, directions=3)


def test_one_sided_steps_count_an_evaluation_for_each_direction(base, tmp_path):
    changes = {"max_steps": 1, "save_strategy": "no"}
    pairs = trained(base, tmp_path / "pairs", changes=changes, directions=2)
    one_sided = trained(base, tmp_path / "one", changes=changes, directions=4, one_sided=True)
    assert one_sided.state.total_flos == pairs.state.total_flos > 0


# ------------------------------------------------------------------------------------------------ a step


@pytest.mark.parametrize("kind", [QZOTrainer, Through])
def test_accumulation_is_one_larger_batch(kind, base, tmp_path):
    """To 1e-6 in the derivative, at eps 0.5 and no clipping: the rounding of float32 losses near 4 over 2 eps."""
    found = []
    for size, steps in ((4, 1), (2, 2), (1, 4)):
        changes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "max_steps": 1}
        run = trained(
            base,
            tmp_path / str(size),
            kind,
            changes={**changes, "save_strategy": "no", "warmup_steps": 0},
            eps=0.5,
            clip=float("inf"),
        )
        found.append(run._optimizer.last.derivatives[0])
    assert found[1:] == pytest.approx([found[0]] * 2, abs=1e-6)
    assert abs(found[0]) > 1e-2


def test_the_schedule_is_in_the_journal(base, plain):
    """Coefficients are those of the rates that transformers' own schedule gives, by the losses in the journal."""
    header, steps, _ = read_whole(Path(plain.args.output_dir) / "journal.qzo")
    assert (header["eps"], header["clip"], header["seed"]) == (1e-2, 5.0, 1)
    assert header["recipe"] == {"trainer": "transformers", "paired": True}
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=2e-2)
    schedule, rates = get_cosine_schedule_with_warmup(optimizer, 2, 6), []
    for [record] in steps:
        rates.append(schedule.get_last_lr()[0])
        derivative = (record.loss_plus - record.loss_minus) / 2e-2
        wanted = kernel_coefs(torch.tensor(-rates[-1] * max(-5.0, min(5.0, derivative))), law_number("rademacher"))
        assert record.applied == pytest.approx(float(wanted), rel=1e-3, abs=1e-12)
        optimizer.step()
        schedule.step()
    assert rates[0] == 0
    assert len(set(rates)) == 5
    assert [line["grad_norm"] for line in plain.state.log_history if "grad_norm" in line] == pytest.approx(
        [abs(r.loss_plus - r.loss_minus) / 2e-2 for [r] in steps], rel=1e-3
    )


def test_the_norm_of_gradients_clips_nothing(base, plain, tmp_path):
    for bound in (0.0, 1e-6):
        run = trained(base, tmp_path / str(bound), changes={"max_grad_norm": bound, "save_strategy": "no"})
        assert torch.equal(scales(run), scales(plain))


@pytest.mark.filterwarnings("ignore:bf16=True is not followed")
def test_activations_have_the_models_dtype(base, plain, tmp_path):
    """Whatever bf16 says: no autocast."""
    run = trained(base, tmp_path, changes={"bf16": True, "save_strategy": "no"})
    assert torch.equal(scales(run), scales(plain))


def test_dropout_is_off(base, plain, tmp_path):
    """Of attention, and of a layer that a callback has set to train."""
    model = copy.deepcopy(base)
    for block in model.model.layers:
        block.self_attn.attention_dropout = 0.5
        block.mlp.act_fn = torch.nn.Sequential(block.mlp.act_fn, torch.nn.Dropout(0.5))
    model.train()
    runs = [
        trained(model, tmp_path / kind.__name__, kind, changes={"save_strategy": "no"}) for kind in (QZOTrainer, Own)
    ]
    assert torch.equal(scales(runs[0]), scales(plain))
    without = trained(base, tmp_path / "without", Own, changes={"save_strategy": "no"})
    assert torch.equal(scales(runs[1]), scales(without))


def test_evaluation_and_callbacks_change_no_bit(base, plain, tmp_path):
    class Counting(TrainerCallback):
        def __init__(self):
            self.seen = []

        def on_step_end(self, args, state, control, model=None, **_):
            self.seen.append(f"step {state.global_step} {model.training}")

        def on_evaluate(self, args, state, control, metrics, **_):
            self.seen.append(f"evaluated {metrics['eval_loss']:.4f}")

    callback = Counting()
    data = rows()[:8]
    run = trained(
        base,
        tmp_path,
        changes={"eval_strategy": "steps", "eval_steps": 3, "save_strategy": "no"},
        eval_dataset=data,
        callbacks=[callback],
    )
    assert torch.equal(scales(run), scales(plain))
    batch = {name: torch.stack([row[name] for row in data]) for name in data[0]}
    after = float(qzo.losses(run.model, batch, 1))
    assert callback.seen[-1] == f"evaluated {after:.4f}"
    assert [line for line in callback.seen if line.startswith("step")] == [f"step {i} True" for i in range(1, 7)]
    assert sum(line.startswith("evaluated") for line in callback.seen) == 2


def test_a_second_call_goes_on(base, tmp_path):
    """As transformers has it: the optimizer stays, the schedule begins again."""
    run = trained(base, tmp_path, changes={"max_steps": 2, "save_strategy": "no"})
    first = scales(run).clone()
    run.train()
    assert len(read_whole(tmp_path / "journal.qzo")[1]) == 4
    assert not torch.equal(scales(run), first)


def test_it_learns(base, tmp_path):
    data = rows(8)
    run = trained(
        base,
        tmp_path,
        changes={"max_steps": 40, "per_device_train_batch_size": 8, "save_strategy": "no", "learning_rate": 0.05},
        train_dataset=data,
        directions=4,
    )
    assert losses_of(run)[-1] < losses_of(run)[0] - 0.5


# ------------------------------------------------------------------------------------------------ checkpoints


def test_what_is_saved_loads_again(plain, base, tmp_path):
    """A checkpoint, and save_model's folder: the source's format, scales rounded to its float16."""
    plain.save_model(str(tmp_path / "model"))
    before = qzo.scales(base)
    for folder in (tmp_path / "model", Path(plain.args.output_dir) / "checkpoint-6"):
        found = qzo.scales(qzo.from_pretrained(folder, device="cpu"))
        wanted = qzo.scales(plain.model)
        assert found.keys() == wanted.keys()
        for name in found:
            assert torch.equal(found[name], wanted[name].half().float())
            assert not torch.equal(found[name], before[name].half().float())


def test_the_best_step_is_the_model_at_the_end(base, tmp_path):
    changes = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "load_best_model_at_end": True}
    run = trained(base, tmp_path, changes={**changes, "learning_rate": 0.3}, eval_dataset=rows()[:8])
    losses = {line["step"]: line["eval_loss"] for line in run.state.log_history if "eval_loss" in line}
    best = min(losses, key=losses.__getitem__)
    assert best < 6, losses  # so that it is not simply where the run ended
    model = copy.deepcopy(base)
    qzo.replay(model, tmp_path / "journal.qzo", until=best)
    assert torch.equal(scales(run), arena_of(model).data)
    assert run.evaluate()["eval_loss"] == losses[best]
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))  # in the same process: the base's scales are kept
    assert torch.equal(scales(run), arena_of(model).data)

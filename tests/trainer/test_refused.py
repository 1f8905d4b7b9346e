"""What a QZO trainer refuses, and what it warns of: by name, with the reason and what to do."""

import copy
import types

import pytest
import torch

from qzo.optim.journal import JournalError
from qzo.trainer import QZOTrainer
from qzo.trainer.refused import why_refused
from tests.support import trainers
from tests.support.small_layers import block
from tests.support.trainers import arguments, rows, trained

GRPO = {
    "loss_type": "dapo",
    "steps_per_generation": 4,
    "num_iterations": 1,
    "gradient_accumulation_steps": 4,
    "use_vllm": False,
}


def trainer_named(name, args=None, **attributes):
    """As much of a trainer as is asked, of a class of this name."""
    args = types.SimpleNamespace(load_best_model_at_end=False, save_only_model=False, **(args or {}))
    known = {
        "is_deepspeed_enabled": False,
        "is_fsdp_enabled": False,
        "optimizer": None,
        "optimizer_cls_and_kwargs": None,
        "model": object(),
    }
    return type(name, (types.SimpleNamespace,), {})(args=args, **{**known, **attributes})


@pytest.mark.parametrize(
    ("name", "args", "attributes", "told"),
    [
        ("SFTTrainer", {"loss_type": "dft"}, {}, "loss_type='dft'.*detached.*use loss_type='nll'"),
        ("DPOTrainer", {"use_weighting": True}, {}, "use_weighting=True.*detached"),
        ("KTOTrainer", {"loss_type": "kto"}, {"calculate_KL": True}, "KL term is detached.*apo_zero_unpaired"),
        ("GRPOTrainer", GRPO, {}, "on policy.*cannot move.*num_iterations=2"),
        ("GRPOTrainer", {**GRPO, "gradient_accumulation_steps": 8}, {}, "on policy"),
        ("GRPOTrainer", {**GRPO, "num_iterations": 2, "loss_type": "cispo"}, {}, "'cispo'.*detached ratio"),
        ("Trainer", {}, {"is_fsdp_enabled": True}, "FSDP.*torchrun"),
        ("Trainer", {}, {"model": types.SimpleNamespace(get_base_model=0)}, "peft"),
        ("Trainer", {}, {"optimizer": object()}, "its own optimizer"),
        ("Trainer", {}, {"neftune_noise_alpha": 5.0}, "neftune_noise_alpha"),
    ],
)
def test_losses_and_settings_by_name(name, args, attributes, told):
    why = why_refused(trainer_named(name, args, **attributes))
    assert why is not None
    with pytest.raises(ValueError, match=told):
        raise ValueError(why)


@pytest.mark.parametrize(
    ("name", "args", "attributes"),
    [
        ("Trainer", {}, {}),
        ("SFTTrainer", {"loss_type": "nll"}, {}),
        ("DPOTrainer", {"use_weighting": False}, {}),
        ("KTOTrainer", {"loss_type": "apo_zero_unpaired"}, {"calculate_KL": False}),
        ("RLOOTrainer", {}, {}),
        ("GRPOTrainer", {**GRPO, "num_iterations": 2}, {}),
        ("GRPOTrainer", {**GRPO, "use_vllm": True, "vllm_importance_sampling_correction": True}, {}),
    ],
)
def test_others_are_accepted(name, args, attributes):
    assert why_refused(trainer_named(name, args, **attributes)) is None


# ------------------------------------------------------------------------------------------------ whole trainers


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return trainers.loaded(tmp_path_factory.mktemp("base"))[0]


class Inline(QZOTrainer):
    """A loss that the model gives as one number."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return model(inputs["input_ids"])["loss"]


class OneNumber(torch.nn.Module):
    """An output that holds the loss of the whole batch only."""

    def __init__(self):
        super().__init__()
        self.embedding, self.inner = torch.nn.Embedding(30, 64), block()

    def forward(self, input_ids):
        return {"loss": self.inner(self.embedding(input_ids)).square().mean()}


@trainers.needs_accelerate
def test_a_fused_loss_of_one_number_runs_in_turn_only(tmp_path):
    changes = {"max_steps": 2, "save_strategy": "no", "remove_unused_columns": False, "warmup_steps": 0}
    with pytest.raises(ValueError, match=r"the loss reads loss of the model's output, one number.*use paired=False"):
        trained(OneNumber(), tmp_path / "a", Inline, changes=changes)
    run = trained(OneNumber(), tmp_path / "b", Inline, changes=changes, paired=False)
    assert run.state.global_step == 2


@trainers.needs_accelerate
def test_a_detached_objective(base, tmp_path):
    class Detached(QZOTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            logits = model(**inputs).logits
            return (logits - logits.detach()).sum()

    with pytest.raises(ValueError, match="the objective ignores the perturbation"):
        trained(base, tmp_path, Detached, changes={"save_strategy": "no"})


@trainers.needs_accelerate
def test_a_router_loss_in_pairs(base, tmp_path):
    model = copy.deepcopy(base)
    model.config.output_router_logits = True
    with pytest.raises(ValueError, match=r"output_router_logits.*paired=False"):
        trained(model, tmp_path)


@trainers.needs_accelerate
def test_a_model_in_which_nothing_trains(tmp_path):
    with pytest.raises(ValueError, match="no QZOLinear layer that trains"):
        QZOTrainer(torch.nn.Linear(4, 4), arguments(tmp_path), train_dataset=rows())


@trainers.needs_accelerate
def test_journals_and_checkpoints_that_do_not_fit(base, tmp_path):
    run = trained(base, tmp_path / "one", changes={"max_steps": 4, "save_steps": 2})
    journal = tmp_path / "one" / "journal.qzo"
    whole = journal.read_bytes()
    with pytest.raises(ValueError, match=r"journal.qzo exists already.*resume_from_checkpoint=True"):
        trained(base, tmp_path / "one")
    with pytest.raises(JournalError, match=r"this run's is 0.02"):
        trained(base, tmp_path / "one", resume=tmp_path / "one" / "checkpoint-2", eps=0.02)
    with pytest.raises(JournalError, match="already tuned"):
        trained(run.model, tmp_path / "one", resume=tmp_path / "one" / "checkpoint-2")
    with pytest.raises(ValueError, match=r"trained in this process.*load the base model again"):
        run.train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-2"))
    other = trained(base, tmp_path / "two", changes={"max_steps": 2, "save_steps": 2, "seed": 2})
    with pytest.raises(ValueError, match="the journal of another run"):
        trained(base, tmp_path / "one", resume=tmp_path / "two" / "checkpoint-2", changes={"seed": 2})
    assert journal.read_bytes() == whole
    assert [p.name for p in (tmp_path / "one").glob("journal*")] == ["journal.qzo"]
    (tmp_path / "two" / "checkpoint-2" / "journal.qzo").unlink()
    with pytest.raises(ValueError, match=r"checkpoint-2 has no journal.qzo"):
        trained(base, tmp_path / "three", resume=tmp_path / "two" / "checkpoint-2")
    assert other.state.global_step == 2


@trainers.needs_accelerate
def test_what_is_warned_of(base, tmp_path):
    with pytest.warns(UserWarning, match="learning_rate=5e-05 is the default of TrainingArguments"):
        QZOTrainer(copy.deepcopy(base), arguments(tmp_path, learning_rate=5e-5), train_dataset=rows())
    with pytest.warns(UserWarning, match=r"bf16=True is not followed.*float32"):
        QZOTrainer(copy.deepcopy(base), arguments(tmp_path, bf16=True), train_dataset=rows())

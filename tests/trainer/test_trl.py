"""TRL's trainers through the mixin: the same bits in pairs, in turn and resumed; what cannot move is refused."""

import contextlib
import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import qzo
from qzo.nn.layers import arena_of
from qzo.trainer import QZOTrainerMixin
from tests.support import trainers
from tests.support.trainers import arguments, losses_of, scales

pytestmark = [
    trainers.needs_accelerate,
    trainers.needs_trl,
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),  # what TRL calls there is not ours
    pytest.mark.filterwarnings("ignore::FutureWarning:trl"),
]
PROMPTS = [f"Headline : {a} {b}" for a in ("red", "fire", "blue", "sky") for b in ("one", "two", "three", "four")]
ROWS: dict[str, Any] = {
    "SFT": [{"prompt": p, "completion": " warm up" if i % 3 else " cold"} for i, p in enumerate(PROMPTS)],
    "DPO": [{"prompt": p, "chosen": " warm up", "rejected": " cold"} for p in PROMPTS],
    "KTO": [{"prompt": p, "completion": " warm up", "label": i % 2 == 0} for i, p in enumerate(PROMPTS)],
    "GRPO": [{"prompt": p} for p in PROMPTS],
}


@pytest.fixture(scope="module", autouse=True)
def _offline():
    """No telemetry of TRL's in tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "CI", "1")
        yield


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return trainers.loaded(tmp_path_factory.mktemp("base"))


def run(loaded, folder, name, resume=None, trains=True, changes=None, **settings):
    """-> a QZO trainer of TRL's by this name that has trained a copy of the base."""
    import trl
    from datasets import Dataset

    kind = type(f"QZO{name}", (QZOTrainerMixin, getattr(trl, f"{name}Trainer")), {})
    changes = {"bf16": False, "save_strategy": "no", "max_steps": 4, "warmup_steps": 0, **(changes or {})}
    args = arguments(folder, getattr(trl, f"{name}Config"), **changes)
    model, tokenizer = copy.deepcopy(loaded[0]), loaded[1]
    rows = Dataset.from_list(ROWS[name])
    trainer = kind(model=model, args=args, train_dataset=rows, processing_class=tokenizer, **settings)
    if trains:
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("SFT", {}),
        ("DPO", {"precompute_ref_log_probs": True}),
        ("KTO", {"loss_type": "apo_zero_unpaired", "precompute_ref_log_probs": True}),
    ],
    ids=["SFT", "DPO", "KTO"],
)
def test_paired_and_in_turn_have_the_same_bits(name, changes, loaded, tmp_path):
    runs = [
        run(loaded, tmp_path / str(paired), name, changes={"max_steps": 2, **changes}, paired=paired, directions=2)
        for paired in (True, False)
    ]
    assert torch.equal(scales(runs[0]), scales(runs[1]))
    assert losses_of(runs[0]) == losses_of(runs[1])
    assert all(line["grad_norm"] > 0 for line in runs[0].state.log_history if "grad_norm" in line)
    assert not torch.equal(scales(runs[0]), arena_of(loaded[0]).data)
    assert not runs[0].args.activation_checkpointing


def test_sft_is_the_loss_of_its_completions(loaded, tmp_path):
    """The first step's loss is near that of qzo.losses, and its tokens are counted once."""
    trainer = run(loaded, tmp_path, "SFT", changes={"max_steps": 2, "train_sampling_strategy": "sequential"})
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    clean = float(qzo.losses(copy.deepcopy(loaded[0]), dict(batch), 1))
    assert losses_of(trainer)[0] == pytest.approx(clean, rel=1e-2)
    tokens = [line["num_tokens"] for line in trainer.state.log_history if "num_tokens" in line]
    assert tokens[0] == batch["attention_mask"].sum()


def test_rows_of_several_lengths_in_one_run_in_turn(loaded, tmp_path):
    changes = {"packing": True, "max_length": 16, "max_steps": 2}
    with pytest.raises(ValueError, match=r"cu_seq_lens_k, cu_seq_lens_q.*paired=False"):
        run(loaded, tmp_path / "a", "SFT", changes=changes)
    trainer = run(loaded, tmp_path / "b", "SFT", changes=changes, paired=False)
    assert not torch.equal(scales(trainer), arena_of(loaded[0]).data)


def test_a_resumed_sft_run_ends_in_the_same_bits(loaded, tmp_path):
    changes = {"save_strategy": "steps", "save_steps": 2}
    whole = run(loaded, tmp_path, "SFT", changes=changes)
    again = run(loaded, tmp_path, "SFT", resume=tmp_path / "checkpoint-2", changes=changes)
    assert torch.equal(scales(again), scales(whole))
    found = qzo.scales(qzo.from_pretrained(Path(tmp_path) / "checkpoint-4", device="cpu"))
    for name, wanted in qzo.scales(whole.model).items():
        assert torch.equal(found[name], wanted.half().float())


def test_sft_is_evaluated_without_the_perturbation(loaded, tmp_path):
    from datasets import Dataset

    trainer = run(loaded, tmp_path, "SFT", changes={"max_steps": 1}, eval_dataset=Dataset.from_list(ROWS["SFT"][:4]))
    found = trainer.evaluate()
    batch = trainer.data_collator([trainer.eval_dataset[i] for i in range(4)])
    assert found["eval_loss"] == pytest.approx(float(qzo.losses(trainer.model, dict(batch), 1)), rel=1e-5)


@pytest.mark.parametrize(
    ("name", "changes", "told"),
    [
        ("SFT", {"loss_type": "dft"}, "loss_type='dft'"),
        ("KTO", {"precompute_ref_log_probs": True}, "KL term is detached"),
        ("GRPO", {"num_generations": 2, "max_completion_length": 4}, "on policy.*cannot move"),
    ],
)
def test_refused(name, changes, told, loaded, tmp_path):
    rewards = {"reward_funcs": lambda completions, **_: [0.0] * len(completions)} if name == "GRPO" else {}
    with pytest.raises(ValueError, match=told), contextlib.redirect_stdout(None):
        run(loaded, tmp_path, name, trains=False, changes=changes, **rewards)


def test_grpo_off_policy_moves(loaded, tmp_path):
    """Old log-probabilities kept from a clean forward: the loss differs between +eps and -eps."""
    trainer = run(
        loaded,
        tmp_path,
        "GRPO",
        changes={"num_generations": 2, "max_completion_length": 4, "num_iterations": 2, "max_steps": 2},
        reward_funcs=lambda completions, **_: [float(text.count("e")) for text in completions],
    )
    norms = [line["grad_norm"] for line in trainer.state.log_history if "grad_norm" in line]
    assert max(norms) > 0
    assert not torch.equal(scales(trainer), arena_of(loaded[0]).data)

"""Runs of QZOTrainer on a tiny 4-bit Llama and random rows, on one rank or several."""

import copy
import hashlib
import importlib.util
import os

import pytest
import torch
import torch.distributed as dist
from transformers import TrainingArguments

import qzo
from qzo.nn.layers import arena_of
from qzo.trainer import QZOTrainer
from tests.support import tiny

TOKENS = 12
needs_accelerate = pytest.mark.skipif(
    importlib.util.find_spec("accelerate") is None,
    reason="transformers' Trainer needs accelerate: pip install 'qzo[trainer]'",
)
needs_trl = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs TRL: pip install 'qzo[trl]'")


def rows(count=32, tokens=TOKENS):
    """Rows of random words, all of them labels; every third row is padded."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for i in range(count):
        ids = torch.randint(3, 30, (tokens,), generator=generator)
        length = tokens - 4 * (i % 3 == 2)
        attended = (torch.arange(tokens) < length).long()
        found.append({"input_ids": ids, "attention_mask": attended, "labels": ids.masked_fill(attended == 0, -100)})
    return found


def arguments(folder, kind=TrainingArguments, **changes):
    """Six steps of four rows on a CPU, with a warm-up and a cosine, saved every third step."""
    settings = {
        "learning_rate": 2e-2,
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "use_cpu": True,
        "report_to": [],
        "logging_steps": 1,
        "save_steps": 3,
        "disable_tqdm": True,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "seed": 1,
    }
    return kind(str(folder), **{**settings, **changes})


def trained(base, folder, kind=QZOTrainer, resume=None, changes=None, **settings):
    """-> a trainer that has trained a copy of the model `base`."""
    data = settings.pop("train_dataset", None) or rows()
    trainer = kind(copy.deepcopy(base), arguments(folder, **(changes or {})), train_dataset=data, **settings)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def scales(trainer):
    """The scales of a trainer's model, float32."""
    return arena_of(trainer.model).data


def digest(trainer):
    """SHA-256 of the scales' bytes."""
    return hashlib.sha256(scales(trainer).numpy().tobytes()).hexdigest()


def losses_of(trainer):
    """The losses that were logged, one a step."""
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def rank(model, folder):
    """What one of several ranks tells: of a run, then of the same run from its checkpoint."""
    from accelerate.state import AcceleratorState

    number, count = str(dist.get_rank()), str(dist.get_world_size())
    os.environ.update(RANK=number, LOCAL_RANK=number, WORLD_SIZE=count, LOCAL_WORLD_SIZE=count)  # as a launcher does
    AcceleratorState._reset_state(reset_partial_state=True)  # the parent's, which is one process
    changes = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2}
    whole = trained(model, folder, changes=changes)
    journal = None if whole._optimizer.journal is None else str(whole._optimizer.journal.path)
    again = trained(model, folder, resume=f"{folder}/checkpoint-2", changes=changes)
    told = {"rank": whole.args.process_index, "ranks": whole.args.world_size, "journal": journal}
    return {**told, "whole": digest(whole), "resumed": digest(again)}


def loaded(folder):
    """The tiny model in 4 bits and its tokenizer; `folder` gets its float checkpoint."""
    tiny.save_checkpoint(folder)
    return qzo.from_pretrained(folder, group_size=32, device="cpu"), qzo.load_tokenizer(folder)

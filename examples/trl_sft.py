"""Supervised fine-tuning with TRL's SFTTrainer, forward passes only: prompts and completions, a schedule, validation.

python examples/trl_sft.py MODEL [OUT]          (pip install 'qzo[trl]')
"""

import sys

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

import qzo
from qzo.trainer import QZOTrainerMixin


class QZOSFTTrainer(QZOTrainerMixin, SFTTrainer):
    """SFTTrainer that trains quantization scales."""


path, out = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "sft"
model, tokenizer = qzo.from_pretrained(path), qzo.load_tokenizer(path)
kinds = {"red": " warm", "fire": " warm", "blue": " cold", "water": " cold"}
numbers = ("one", "two", "three", "four")
rows = [{"prompt": f"Headline : {word} {n}", "completion": kinds[word]} for word in kinds for n in numbers]
data = Dataset.from_list(rows).train_test_split(test_size=4, seed=0)

directions = 4
arguments = SFTConfig(
    out,
    learning_rate=2e-2 * directions,
    lr_scheduler_type="linear",
    max_steps=20,
    per_device_train_batch_size=8,
    eval_strategy="steps",
    eval_steps=10,
    save_strategy="no",
    logging_steps=5,
    report_to="none",  # or tensorboard, wandb
    bf16=False,
)
trainer = QZOSFTTrainer(
    model,
    arguments,
    train_dataset=data["train"],
    eval_dataset=data["test"],
    processing_class=tokenizer,
    directions=directions,
)
before = trainer.evaluate()["eval_loss"]
trainer.train()
trainer.save_model(f"{out}/model")  # the format that the model came in
print(f"loss on held-out rows: {before:.3f} -> {trainer.evaluate()['eval_loss']:.3f}")

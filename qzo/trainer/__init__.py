"""transformers' Trainer and TRL's trainers with forward passes only: `QZOTrainer`, `QZOTrainerMixin` for the others.

mixin.py        the trainers: which hooks of transformers.Trainer are overridden, and why
accumulated.py  the optimizer of a trainer: losses of micro-batches and ranks, added up before a step
captured.py     what a CUDA graph is captured of: the losses of a micro-batch, in few shapes
stacked.py      what stands for the model inside a loss function, so that one forward serves all evaluations
refused.py      losses and settings whose differences under the perturbation mean nothing
"""

from .mixin import QZOTrainer, QZOTrainerMixin

__all__ = ["QZOTrainer", "QZOTrainerMixin"]

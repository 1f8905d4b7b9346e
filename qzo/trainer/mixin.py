"""QZOTrainer and QZOTrainerMixin: which hooks of transformers.Trainer are overridden, and why. No loop is copied.

| hook | here |
|---|---|
| `create_optimizer` | QZO on the arena; the journal is written beside the checkpoints |
| `training_step` | no gradients; `compute_loss`, whoever wrote it, gives the loss of each evaluation |
| `accelerator.backward` | those losses are added up, micro-batch after micro-batch |
| `_clip_grad_norm`, `_get_grad_norm` | nothing (DDC clips); the largest derivative, summed over the ranks |
| `accelerator.prepare_model` | no DDP, and no autocast |
| saving and loading of checkpoints | the source's format, and the journal so far, which a resume replays |
"""

import functools
import math
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer, TrainingArguments

from ..checkpoints.save import save_pretrained
from ..checkpoints.source import source_of
from ..loss.head import has_encoder
from ..nn.layers import arena_of, layers
from ..optim.defaults import CLIP, EPS, FLOOR
from ..optim.step import evaluation_count
from ..system.disk import write_whole
from ..training.validation import Base
from .accumulated import AccumulatedQZO
from .captured import PADDING, OwnLosses, padded
from .refused import why_refused
from .stacked import StackedModel, shadowed

JOURNAL = "journal.qzo"
_Base: Any = Trainer if TYPE_CHECKING else object


class QZOTrainerMixin(_Base):
    """Makes a trainer of transformers or TRL train quantization scales by forward passes only.

    Stands before the trainer's class: `class QZOSFTTrainer(QZOTrainerMixin, SFTTrainer): pass`. All of the trainer's
    arguments stay; `learning_rate`, its schedule and `seed` are those of `QZO`. The default learning rates of trainers
    are made for gradients: with relative noise start at 2e-2 for each direction.

    The loss is what the trainer's `compute_loss` gives. Where that is transformers' own, and labels are numbers of
    tokens or classes, it is `qzo.losses`: the same loss from the logits at labelled positions only. A custom
    `compute_loss`, TRL's included, runs once for each evaluation on its part of one stacked forward. Dropout is off;
    `max_grad_norm` is ignored, `clip` takes its place; activations have the model's own dtype, whatever `fp16` and
    `bf16` say. `grad_norm` in the logs is the largest derivative of the step.

    `output_dir` holds `journal.qzo`, the fine-tune. A checkpoint holds the model in its source's format and the journal
    so far; `train(resume_from_checkpoint=...)` replays that on the base model, which the trainer has to be given
    again, and ends in the bits of a run that was not interrupted.

    Parameters
    ----------
    args, kwargs
        Of the trainer; the model holds QZOLinear layers (`qzo.from_pretrained`).
    eps, clip, noise, relative, sharing, directions, one_sided, floor, large_rows
        As in `QZO`.
    cuda_graph
        Make the losses of a micro-batch as a CUDA graph, where they are transformers' own of labels [rows, tokens]
        (captured.py): the same bits. None (the default): where there is a CUDA device; True: a warning where there is
        none, another loss, or several ranks; False: never. What cannot be captured runs without, after one warning.
    paired
        One forward for all E evaluations, 2 J or one-sided J, the batch stacked E times; False: a forward each, in
        turn, which takes less memory.

    Raises
    ------
    ValueError
        Nothing in the model trains; a loss whose difference means nothing, or settings that cannot be (refused.py).
        In training: an objective that ignores the perturbation; paired, a loss that mixes the evaluations.
    JournalError
        A ValueError: output_dir has a journal and none is resumed, or it belongs to another model.
    ImportError
        Without accelerate (`pip install 'qzo[trainer]'`).
    """

    def __init__(
        self,
        *args: Any,
        eps: float = EPS,
        clip: float = CLIP,
        noise: str = "rademacher",
        relative: bool = True,
        sharing: str = "group",
        directions: int = 1,
        one_sided: bool = False,
        floor: float = FLOOR,
        large_rows: str = "fused",
        cuda_graph: bool | None = None,
        paired: bool = True,
        **kwargs: Any,
    ) -> None:
        self.paired = paired
        self._settings: dict[str, Any] = {
            "eps": eps,
            "clip": clip,
            "noise": noise,
            "relative": relative,
            "sharing": sharing,
            "directions": directions,
            "one_sided": one_sided,
            "floor": floor,
            "large_rows": large_rows,
            "cuda_graph": cuda_graph,
            "paired": paired,
        }
        self._qzo: AccumulatedQZO | None = None
        self._resumed: Path | None = None  # the journal in the checkpoint that a run goes on from
        self._base: Base | None = None  # the scales before the first step, if they may be wanted again
        for given in (*args, *kwargs.values()):
            if isinstance(given, TrainingArguments):  # one process, one device: no DataParallel
                given._n_gpu = min(1, given.n_gpu)
        super().__init__(*args, **kwargs)
        why = why_refused(self)
        if why is not None:
            raise ValueError(why)
        if self.model_init is None:
            arena_of(self.model, exact=True)
        self.args.gradient_checkpointing = self.args.activation_checkpointing = False  # TRL turns it on
        self._use_the_models_dtype()
        self._pads = self._has_own_loss and self.args.device.type == "cuda"  # whether or not there are graphs
        if cuda_graph and not (self._pads and self.args.world_size == 1):
            self._warn_of_no_graph()
        _warn_of_default_rate(self.args)
        self.accelerator.backward = lambda losses, **_: self._optimizer.accumulate(losses)
        self.accelerator.prepare_model = functools.partial(self.accelerator.prepare_model, evaluation_mode=True)

    def _use_the_models_dtype(self) -> None:
        """No autocast, no scaler of gradients; a warning where another dtype than the model's was asked for."""
        asked = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else None
        dtype = getattr(self.model, "dtype", asked)
        if asked not in (None, dtype):
            warnings.warn(
                f"{'bf16' if self.args.bf16 else 'fp16'}=True is not followed: activations have the model's own dtype, "
                f"{str(dtype).removeprefix('torch.')}; load the model in the dtype that you want, and give bf16=False",
                stacklevel=3,
            )
        self.accelerator.native_amp, self.accelerator.scaler = False, None

    def _warn_of_no_graph(self) -> None:
        why = (
            "several ranks add up their losses on the host"
            if self.args.world_size > 1
            else f"the model is on {self.args.device.type!r}, a graph needs a CUDA device"
            if self._has_own_loss
            else "the loss is not transformers' own, and what it keeps in Python a graph would not change"
        )
        warnings.warn(f"cuda_graph=True: {why}; the steps run without a graph", stacklevel=3)

    @property
    def _optimizer(self) -> AccumulatedQZO:
        assert self._qzo is not None, "create_optimizer comes first"
        return self._qzo

    # ------------------------------------------------------------------------------------------------ the optimizer

    optimizer: Any

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """QZO of the model's scales, where a resumed journal left them; its journal is that of output_dir."""
        self._freeze()
        if self.optimizer is None or self._resumed is not None:
            self.optimizer = self._qzo = self._new_optimizer()
            self._resumed = None
        return self.optimizer

    def _freeze(self) -> None:
        """No gradients, no dropout: until the run ends `train` sets the whole model's flag only, which TRL reads."""
        model = self.model
        model.requires_grad_(False).eval()

        def train(mode: bool = True) -> Any:
            model.__dict__["training"] = mode
            return model

        model.__dict__.update(train=train, zero_grad=lambda set_to_none=True: self._optimizer.zero_grad())

    def _new_optimizer(self) -> AccumulatedQZO:
        journal, main = Path(self.args.output_dir) / JOURNAL, self.args.process_index == 0
        if self._qzo is not None:
            self._qzo.close()
            if self._qzo.graphs is not None:
                self._qzo.graphs.drop()
        if self._qzo is not None and self._qzo.module is self.model:  # resumed after steps in this process
            self._known_base().restore()
        elif self.args.load_best_model_at_end:
            self._base = Base(self.model)
        if main and journal.exists() and self._resumed is None:
            raise ValueError(
                f"{journal} exists already, the journal of an earlier run: resume that "
                "(train(resume_from_checkpoint=True)), give another output_dir, or delete the journal"
            )
        if self._resumed is not None and main:
            return self._go_on(journal, self._resumed.read_bytes())
        return self._qzo_of(journal, resume=self._resumed is not None)  # of which the first process writes it

    def _qzo_of(self, journal: Path | None, resume: bool = False) -> AccumulatedQZO:
        return AccumulatedQZO(
            self.model,
            self.args.learning_rate,
            seed=self.args.seed,
            journal=journal,
            resume=resume,
            recipe={"trainer": "transformers", "paired": self.paired} | ({"padding": PADDING} if self._pads else {}),
            **self._settings,
        )

    def _go_on(self, journal: Path, resumed: bytes) -> AccumulatedQZO:
        """The optimizer at the end of a checkpoint's journal, which takes the place of one that went on from there."""
        if journal.exists() and not journal.read_bytes().startswith(resumed):
            raise ValueError(
                f"{journal} is the journal of another run than {self._resumed}: give another output_dir, or delete it"
            )
        beside = journal.with_name(f"{JOURNAL}.resumed")
        beside.parent.mkdir(parents=True, exist_ok=True)
        write_whole(beside, resumed)
        try:
            optimizer = self._qzo_of(beside, resume=True)
        except ValueError:  # of another model, or other settings: the journal that is there stays
            beside.unlink()
            raise
        assert optimizer.journal is not None
        optimizer.journal.path = beside.replace(journal)
        return optimizer

    def _known_base(self) -> Base:
        if self._base is None:
            raise ValueError(
                "this model has been trained in this process, and a journal is replayed on the base: load the base "
                "model again and make a new trainer (load_best_model_at_end=True keeps a copy of the base's scales)"
            )
        return self._base

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in the trainer."""
        try:
            return super().train(*args, **kwargs)
        finally:
            for name in ("train", "zero_grad"):
                self.model.__dict__.pop(name, None)

    # ------------------------------------------------------------------------------------------------ a step

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """A micro-batch: its losses under all evaluations go to the optimizer; returns their mean."""
        compute_loss = functools.partial(self._losses, self.compute_loss)
        with torch.no_grad(), shadowed(self, "compute_loss", compute_loss):
            return super().training_step(*args, **kwargs).mean().float()

    def _losses(
        self, compute_loss: Callable[..., torch.Tensor], model: Any, inputs: Any, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """The loss of each evaluation, float64 [E]."""
        optimizer = self._optimizer
        evaluations = optimizer.evaluations()
        if self._is_own_loss(model, inputs):
            closure = OwnLosses(model, len(evaluations) if self.paired else 1)
            losses = optimizer.evaluate(closure, padded(model, inputs) if self._pads else dict(inputs))
            return losses * self._share(model, inputs["labels"], num_items_in_batch)
        counted = getattr(self, "_total_train_tokens", None)  # TRL counts a batch's tokens in its compute_loss

        def loss(model: Any) -> torch.Tensor:
            if counted is not None:
                self._total_train_tokens = counted
            return compute_loss(model, dict(inputs), num_items_in_batch=num_items_in_batch)

        if not self.paired:
            return optimizer.losses(functools.partial(loss, model), evaluations, False)
        if _adds_router_loss(model, inputs):
            raise ValueError(
                "the loss of the router (output_router_logits) is one number of the whole stacked batch, in which the "
                "evaluations are mixed: use paired=False, or output_router_logits=False"
            )
        stacked = StackedModel(model, len(evaluations))
        return optimizer.losses(lambda: stacked.losses(loss), evaluations, True).double()

    @property
    def _has_own_loss(self) -> bool:
        """Whether losses are a model's own, as transformers' compute_loss takes them."""
        return (
            type(self).compute_loss is Trainer.compute_loss
            and self.compute_loss_func is None
            and self.label_smoother is None
        )

    def _is_own_loss(self, model: Any, inputs: Any) -> bool:
        """Whether the loss is a model's own, and one that qzo.losses knows."""
        labels = inputs.get("labels") if isinstance(inputs, Mapping) else None
        return (
            self._has_own_loss
            and hasattr(model, "config")
            and isinstance(labels, torch.Tensor)
            and labels.dtype == torch.int64
            and not _adds_router_loss(model, inputs)
        )

    def _share(self, model: Any, labels: torch.Tensor, num_items_in_batch: Any) -> Any:
        """What the mean over a micro-batch is multiplied by: its share of the step's labels, as transformers has it."""
        if not self.model_accepts_loss_kwargs or num_items_in_batch is None:
            return 1.0
        read = labels if labels.dim() == 1 or has_encoder(model) else labels[:, 1:]
        ranks = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return (read != -100).sum().double() * ranks / num_items_in_batch

    def _clip_grad_norm(self, model: Any) -> None:
        """Nothing: the optimizer clips derivatives."""

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> float:
        return float(self._optimizer.reduce().abs().max())

    def floating_point_ops(self, inputs: Any) -> int:
        """Of the forwards of a micro-batch: two for each weight, token and evaluation."""
        main = getattr(self.model, "main_input_name", "input_ids")
        tokens = inputs.get(main) if isinstance(inputs, Mapping) else None  # of TRL a list of prompts
        count = math.prod(tokens.shape[:2]) if isinstance(tokens, torch.Tensor) else 0
        return 2 * evaluation_count(self._settings) * count * self._weights

    @functools.cached_property
    def _weights(self) -> int:
        quantized = layers(self.model, trainable=None).values()
        return sum(m.in_features * m.out_features for m in quantized) + sum(
            p.numel() for p in self.model.parameters() if p.dim() > 1
        )

    # ------------------------------------------------------------------------------------------------ checkpoints

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """The model in its source's format, the rest as the trainer saves it."""
        if source_of(self.model) is None:
            return super()._save(output_dir, state_dict)
        with shadowed(self.model, "save_pretrained", lambda folder, **_: save_pretrained(self.model, folder)):
            return super()._save(output_dir, {})

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self._optimizer.journal is not None:
            shutil.copyfile(self._optimizer.journal.path, Path(output_dir) / JOURNAL)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Nothing of the model is read: `create_optimizer` replays the checkpoint's journal."""
        self._resumed = _journal_in(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        """The scales as they were at the best checkpoint, from the base's and the journal."""
        self._known_base().rebuild(_journal_in(self.state.best_model_checkpoint))


class QZOTrainer(QZOTrainerMixin, Trainer):
    """transformers.Trainer that trains quantization scales by forward passes only; see `QZOTrainerMixin`."""


def _journal_in(checkpoint: str | Path) -> Path:
    journal = Path(checkpoint) / JOURNAL
    if not journal.is_file():
        raise ValueError(
            f"{checkpoint} has no {JOURNAL}: only checkpoints of a QZO trainer that were saved with "
            "save_only_model=False can be resumed"
        )
    return journal


def _adds_router_loss(model: Any, inputs: Any) -> bool:
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    asked = isinstance(inputs, Mapping) and inputs.get("output_router_logits")
    return bool(asked or getattr(text, "output_router_logits", False))


def _warn_of_default_rate(args: TrainingArguments) -> None:
    default = type(args).__dataclass_fields__["learning_rate"].default
    if args.learning_rate == default:
        warnings.warn(
            f"learning_rate={default:g} is the default of {type(args).__name__}, which is made for gradients; scales "
            "that move relative to themselves start at 2e-2 for each direction",
            stacklevel=3,
        )

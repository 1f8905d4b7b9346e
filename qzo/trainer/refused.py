"""What a trainer that compares two losses cannot train, by name and with the reason.

Only a loss's value is seen, so a stop-gradient has no meaning: where a loss holds a detached copy of what it trains,
the difference of its values follows another function than its gradient, or is zero.
"""

from typing import Any

_ONLY_VALUES = "qzo compares values of a loss, in which a detached factor moves too"


def why_refused(trainer: Any) -> str | None:
    """Why a trainer's loss or settings are refused, in a sentence with what to do; None where they are not."""
    kinds, args = {kind.__name__ for kind in type(trainer).__mro__}, trainer.args
    return _by_settings(trainer) or next(
        (why for kind, why_not in _LOSSES.items() if kind in kinds and (why := why_not(trainer, args))), None
    )


def _by_settings(trainer: Any) -> str | None:
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        return (
            "DeepSpeed and FSDP shard gradients and optimizer states, and there are none here: run the ranks with "
            "torchrun alone"
        )
    if hasattr(trainer.model, "get_base_model"):
        return (
            "the model is wrapped by peft: the scales of the quantized layers train, adapters would not; give the "
            "model itself, and no peft_config"
        )
    if trainer.optimizer is not None or trainer.optimizer_cls_and_kwargs is not None:
        return "the trainer makes its own optimizer: give eps, clip, noise, directions ... and no optimizer"
    if getattr(trainer, "neftune_noise_alpha", None) is not None:
        return (
            "neftune_noise_alpha draws other noise in each forward, which would differ between the losses that are "
            "compared: leave it out"
        )
    if trainer.args.load_best_model_at_end and trainer.args.save_only_model:
        return (
            "load_best_model_at_end rebuilds the best step from the journal in its checkpoint, which "
            "save_only_model=True leaves out: leave one of them out"
        )
    return None


def _sft(trainer: Any, args: Any) -> str | None:
    if args.loss_type == "dft":
        return (
            "SFTTrainer with loss_type='dft': each token's loss is weighted by its own detached probability; "
            f"{_ONLY_VALUES}, and the difference has the wrong sign where p < 1/e: use loss_type='nll'"
        )
    return None


def _dpo(trainer: Any, args: Any) -> str | None:
    if getattr(args, "use_weighting", False):
        return (
            "DPOTrainer with use_weighting=True: the weights are detached probabilities of the model that trains; "
            f"{_ONLY_VALUES}: use use_weighting=False"
        )
    return None


def _kto(trainer: Any, args: Any) -> str | None:
    if getattr(trainer, "calculate_KL", True):
        return (
            f"KTOTrainer with loss_type={args.loss_type!r}: its KL term is detached, a reference point that is not to "
            f"move; {_ONLY_VALUES}: use loss_type='apo_zero_unpaired', which has none"
        )
    return None


def _grpo(trainer: Any, args: Any) -> str | None:
    if args.loss_type in ("cispo", "vespo"):
        return (
            f"GRPOTrainer with loss_type={args.loss_type!r}: log-probabilities are weighted by a detached ratio of the "
            f"model that trains; {_ONLY_VALUES}: use loss_type='grpo' or 'dapo' with num_iterations=2"
        )
    every = args.steps_per_generation * args.num_iterations
    kept = args.use_vllm and getattr(args, "vllm_importance_sampling_correction", False)
    if args.gradient_accumulation_steps % every == 0 and not kept:
        return (
            "GRPOTrainer on policy: the ratio is exp(logp - logp.detach()), which is 1 whatever the scales are, so the "
            "loss cannot move and nothing would be learned: use num_iterations=2 (the old log-probabilities are then "
            "kept from a clean forward), or RLOOTrainer"
        )
    return None


_LOSSES = {"SFTTrainer": _sft, "DPOTrainer": _dpo, "KTOTrainer": _kto, "GRPOTrainer": _grpo}

"""What a pipeline's scheduler says of the times that its transformer was trained at.

A flow-matching transformer goes with one of diffusers' FlowMatch schedulers, or with another one that is told to
predict a flow. Any other belongs to a model of another objective: its times and its target would pull a flow model
apart, though the loss falls.
"""

import math
from collections.abc import Mapping
from typing import Any

TIMES = 1000  # num_train_timesteps: a transformer is given TIMES * s


def check_flow(scheduler: Mapping[str, Any], where: object) -> None:
    """ValueError, with the reason, for the scheduler_config.json at `where` if it is not that of a flow model."""
    name = " ".join(str(scheduler.get("_class_name")).split())[:60]
    if name.startswith("FlowMatch"):
        count = scheduler.get("num_train_timesteps", TIMES)
        if count != TIMES:
            raise ValueError(f"{where}: num_train_timesteps is {count!r:.60}; {TIMES} is what flow models are given")
        return
    if scheduler.get("prediction_type") == "flow_prediction":
        return
    raise ValueError(
        f"{where}: {name} is no scheduler of a flow model: its noise schedule, times and target (prediction_type "
        f"{scheduler.get('prediction_type', 'epsilon')!r:.60}) are those of another objective, which pulls a flow "
        "model's velocity apart while its loss falls; give the pipeline with the scheduler that it is published with, "
        "such as FlowMatchEulerDiscreteScheduler"
    )


def shift_of(scheduler: Mapping[str, Any], tokens: int) -> float:
    """The shift a of s = a u / (1 + (a - 1) u); tokens: of a picture, which dynamic shifting depends on. ValueError for
    a scheduler whose numbers make none."""
    try:
        found = _shift_of(scheduler, tokens)
        if not 0 < found < math.inf:
            raise ValueError(f"it would be {found:g}")
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ValueError(f"the scheduler's config makes no shift of the times ({error}); give --shift") from None
    return found


def _shift_of(scheduler: Mapping[str, Any], tokens: int) -> float:
    if not scheduler.get("use_dynamic_shifting"):
        return float(scheduler.get("shift") or scheduler.get("flow_shift") or 1.0)
    first, last = scheduler.get("base_image_seq_len", 256), scheduler.get("max_image_seq_len", 4096)
    low, high = scheduler.get("base_shift", 0.5), scheduler.get("max_shift", 1.15)
    at = low + (high - low) * (tokens - first) / (last - first)
    return math.exp(at) if scheduler.get("time_shift_type", "exponential") == "exponential" else at

"""What a scheduler's config says: whether it is of a flow model, and the shift of its times."""

import math

import pytest

from qzo.diffusion.schedulers import check_flow, shift_of

EULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
SANA = {"_class_name": "DPMSolverMultistepScheduler", "prediction_type": "flow_prediction", "flow_shift": 3.0}


@pytest.mark.parametrize("scheduler", [EULER, SANA])
def test_schedulers_of_flow_models_are_taken(scheduler):
    check_flow(scheduler, "here")
    assert shift_of(scheduler, 1024) == 3.0


@pytest.mark.parametrize(
    ("scheduler", "told"),
    [
        ({"_class_name": "DDPMScheduler"}, r"here: DDPMScheduler is no scheduler of a flow model: .* 'epsilon'"),
        ({"_class_name": "EulerDiscreteScheduler", "prediction_type": "v_prediction"}, "'v_prediction'"),
        (EULER | {"num_train_timesteps": 500}, "num_train_timesteps is 500; 1000"),
    ],
)
def test_others_are_refused_with_the_reason(scheduler, told):
    with pytest.raises(ValueError, match=told):
        check_flow(scheduler, "here")


def test_a_dynamic_shift_is_the_schedulers_own():
    """Linear in the tokens between two of them, as diffusers' pipelines compute it, through its exponential."""
    pytest.importorskip("diffusers")
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    dynamic = EULER | {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
    for tokens in (256, 1024, 4096):
        assert shift_of(dynamic, tokens) == pytest.approx(math.exp(calculate_shift(tokens)))
    assert shift_of(dynamic | {"time_shift_type": "linear"}, 1024) == pytest.approx(calculate_shift(1024))


def test_times_are_those_that_the_scheduler_samples_at():
    """Its sigmas are the law's times of evenly spread u, without a density."""
    diffusers = pytest.importorskip("diffusers")
    import torch

    from qzo.diffusion.objective import FlowLaw

    sigmas = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).sigmas.double()
    u = torch.arange(1000, 0, -1).double() / 1000
    assert torch.allclose(FlowLaw("uniform", shift=3.0).times(u), sigmas, atol=1e-6)


@pytest.mark.parametrize(
    "said",
    [{"shift": "x"}, {"shift": [1]}, {"shift": -1.0}, {"shift": float("inf")}]
    + [
        {"use_dynamic_shifting": True, **more}
        for more in ({"max_image_seq_len": 256}, {"max_shift": 1e9}, {"base_shift": None})
    ],
)
def test_numbers_that_make_no_shift_are_refused(said):
    with pytest.raises(ValueError, match=r"the scheduler's config makes no shift of the times .*; give --shift"):
        shift_of(EULER | said, 1024)

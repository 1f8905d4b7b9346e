"""The torch.library operators: registration, fakes and checks."""
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from qzo.kernels import noise
from tests.test_linear import asymmetric


def qmm_arguments(layer, out_dtype=torch.float32):
    return (torch.randn(4, layer.in_features), layer.codes, layer.arena.quads(layer.arena_name), layer.zeros,
            layer.bias.detach(), torch.tensor([1, 2]), torch.tensor([0.1, 0.0]), 0, layer.group_size,
            noise.RADEMACHER, True, out_dtype)


@pytest.mark.parametrize("float_zeros", [True, False])
def test_opcheck_qmm(float_zeros):
    torch.library.opcheck(torch.ops.qzo.qmm.default, qmm_arguments(asymmetric(float_zeros=float_zeros)))


def test_opcheck_update():
    arguments = torch.rand(64), torch.tensor([1, 2]), torch.tensor([0.1, -0.1]), 3, noise.IH4, True, 0.0
    torch.library.opcheck(torch.ops.qzo.update_.default, arguments)


def test_fake_tensors_pass_through_a_layer_and_meet_the_same_checks():
    arguments = qmm_arguments(asymmetric(), torch.float16)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments]
        y = torch.ops.qzo.qmm(*fake)
        assert (y.shape, y.dtype) == ((4, 6), torch.float16)
        with pytest.raises(ValueError, match="3 rows do not divide into 2 evaluations"):
            torch.ops.qzo.qmm(fake[0][:3], *fake[1:])


def test_operators_refuse_what_does_not_fit():
    x, codes, scales, zeros, bias, seeds, coefs, *rest = qmm_arguments(asymmetric())
    for wrong, message in (((x, codes, scales[:, :5], zeros, bias, seeds, coefs), "scales must be float32"),
                           ((x, codes, scales, zeros[:2], bias, seeds, coefs), "zeros must be"),
                           ((x, codes, scales, zeros, bias[:5], seeds, coefs), "bias must have shape"),
                           ((x, codes, scales, zeros, bias, seeds, coefs[:1]), "2 seeds and 1 coefficients")):
        with pytest.raises(ValueError, match=message):
            torch.ops.qzo.qmm(*wrong, *rest)
    with pytest.raises(ValueError, match="whole quads"):
        torch.ops.qzo.update_(torch.ones(5), seeds, coefs, 0, noise.IH4, True, 0.0)
    with pytest.raises(ValueError, match="int64 and float32"):
        torch.ops.qzo.update_(torch.ones(8), seeds, coefs.double(), 0, noise.IH4, True, 0.0)

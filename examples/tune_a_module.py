"""Any torch module: quantize its Linears to 2 bits, then win back accuracy by tuning the scales, forward passes only.

python examples/tune_a_module.py
"""

import copy

import torch

import qzo

torch.manual_seed(0)
teacher = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.Tanh(), torch.nn.Linear(128, 8))
student = qzo.quantize_(copy.deepcopy(teacher), bits=2, group_size=32)
x = torch.randn(256, 64)
with torch.no_grad():
    want = teacher(x)

directions = 8
evaluations = 2 * directions  # +eps and -eps of every direction, in one forward
optimizer = qzo.QZO(student, lr=24.0, directions=directions, seed=0)


def losses():
    """The mean squared error under each evaluation, float32 [16]."""
    error = student(qzo.pair(x, evaluations)) - qzo.pair(want, evaluations)
    return error.square().view(evaluations, -1).mean(1)


first = optimizer.step(losses)
for _ in range(100):
    last = optimizer.step(losses)
count = sum(scale.numel() for scale in qzo.scales(student).values())
print(f"error {first:.4f} -> {last:.4f} by {count} scales; the codes are as they were")

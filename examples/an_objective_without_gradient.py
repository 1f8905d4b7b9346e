"""An objective that has no gradient: the number of wrong predictions, counted.

python examples/an_objective_without_gradient.py
"""

import torch

import qzo

torch.manual_seed(0)
x = torch.randn(256, 32)
label = (x[:, :16].sum(1) > 0).long()
model = torch.nn.Sequential(torch.nn.Linear(32, 256), torch.nn.ReLU(), torch.nn.Linear(256, 2))
qzo.quantize_(model, group_size=32)
directions = 8
evaluations = 2 * directions
optimizer = qzo.QZO(model, lr=2.0, eps=0.1, directions=directions)


def wrong():
    """The share of wrong predictions under each evaluation, float32 [16]: steps, no slope."""
    predicted = model(qzo.pair(x, evaluations)).argmax(1)
    return (predicted != qzo.pair(label, evaluations)).float().view(evaluations, -1).mean(1)


first = optimizer.step(wrong)
for _ in range(50):
    last = optimizer.step(wrong)
print(f"wrong predictions: {first:.1%} -> {last:.1%}")

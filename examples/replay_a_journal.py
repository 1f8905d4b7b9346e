"""Send a fine-tune as a journal of a few kilobytes: replay it on the base model, whole or up to a step.

python examples/replay_a_journal.py BASE JOURNAL [UNTIL]
"""

import sys

import qzo

base, journal = sys.argv[1], sys.argv[2]
until = int(sys.argv[3]) if len(sys.argv) > 3 else None
model = qzo.from_pretrained(base)
before = qzo.scales(model)
steps = qzo.replay(model, journal, until=until)
moved = max(float((after / before[name] - 1).abs().max()) for name, after in qzo.scales(model).items())
print(f"{steps} steps applied; the scale that moved most moved by {moved:.2%}")

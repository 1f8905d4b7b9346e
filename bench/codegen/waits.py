"""What compiled code reads, and when: how far behind a read of global memory its value is first used, which hides the
time that the read takes; and which of a kernel's arguments inline assembly names."""

import re

REGISTER = re.compile(r"\bR(\d+)\b")


def read_ahead(body):
    """Fewest instructions of a loop (Instruction each) from a read of global memory into registers to the first
    one that takes its value, around the loop's end where it is there; None where nothing is read."""
    found = [_distance(body, at) for at, i in enumerate(body) if i.name.startswith("LDG.")]
    return min((distance for distance in found if distance), default=None)


def _distance(body, at):
    """Of the read body[at]; None where its value is not used in the loop."""
    wide = re.search(r"\.(64|128)\b", body[at].name)
    [first, *_] = map(int, REGISTER.findall(body[at].operands))
    held = set(range(first, first + (int(wide[1]) // 32 if wide else 1)))
    for distance in range(1, len(body) + 1):
        other = body[(at + distance) % len(body)]
        named = [int(number) for number in REGISTER.findall(other.operands)]
        # the first register that is named is written, but by a store
        written = [] if other.name.startswith("ST") else named[:1]
        if held & set(named[len(written) :]):
            return distance
        held -= set(written)
    return None


def base_argument(ptx, signature):
    """Which of a kernel's arguments inline assembly takes its codebooks from; "": none. signature: (name, type) each.

    The compiled entry lists its parameters in the arguments' order, and behind them Triton's own.
    """
    arguments = [name for name, kind in signature if kind != "constexpr"]
    entry = re.search(r"\.entry \w+\((.*?)\)", ptx, re.DOTALL)
    assert entry is not None, "compiled code has an entry"
    named = dict(zip(re.findall(r"(\w+),?\s*(?:\n|$)", entry[1]), arguments, strict=False))
    return " ".join(sorted({named.get(name, name) for name in re.findall(r"ld\.param\.u64 base, \[(\w+)\]", ptx)}))

"""`qzo journal`: what a journal holds, whether it is whole, two compared, pieces cut and joined. It needs no torch."""

import argparse
import dataclasses
import json
from collections.abc import Iterator
from typing import Any

from ..optim import pieces
from ..optim.journal import Contents
from ..system.as_json import finite

_LAW = ("law", "relative", "sharing", "floor", "eps", "clip", "directions", "seed")


def execute(options: argparse.Namespace) -> int:
    """Run the chosen action; exit status. ValueError and OSError for bad input."""
    return {"show": _show, "verify": _verify, "diff": _diff, "cut": _cut, "concat": _concat}[options.action](options)


def _show(options: argparse.Namespace) -> int:
    found = pieces.contents(options.file)
    records = [dataclasses.asdict(record) for step in found.steps for record in step] if options.steps else None
    if options.json:
        more = {} if records is None else {"records": records}
        print(json.dumps(finite({"header": found.header, **_state(found), **_losses(found), **more})))
        return 0
    print("\n".join(_lines(options.file, found)))
    for record in records or []:
        print(
            *(f"{name} {value}" for name, value in record.items() if name != "skipped"),
            *["skipped"] * record["skipped"],
        )
    return 0


def _verify(options: argparse.Namespace) -> int:
    """Status 2 for a damaged one, as for every bad input."""
    found = pieces.contents(options.file)
    if options.json:
        print(json.dumps(_state(found)))
        return 0 if found.damage is None else 2
    found.check()
    print(f"{options.file} is whole: {_extent(found)}")
    return 0


def _diff(options: argparse.Namespace) -> int:
    """Status 1 if anything but the versions differs."""
    both = pieces.contents(options.first), pieces.contents(options.second)
    for found in both:
        found.check()
    fields, alike = pieces.header_differences(*both), pieces.alike(*both)
    steps = [len(found.steps) for found in both]
    same = steps == [alike, alike] and all(name.startswith("versions.") for name in fields)
    if options.json:
        print(json.dumps(finite({"same": same, "header": fields, "steps": steps, "alike": alike})))
        return 0 if same else 1
    for name, (first, second) in fields.items():
        print(f"{name}: {first} in {options.first}, {second} in {options.second}")
    print(
        f"{steps[0]} and {steps[1]} steps, the first {alike} of them alike" if not same else f"the same {alike} steps"
    )
    return 0 if same else 1


def _cut(options: argparse.Namespace) -> int:
    return _written(options, pieces.cut(options.file, options.output, options.start, options.until))


def _concat(options: argparse.Namespace) -> int:
    return _written(options, pieces.concat(options.files, options.output))


def _written(options: argparse.Namespace, steps: int) -> int:
    print(
        json.dumps({"steps": steps, "output": options.output}) if options.json else f"{options.output}: {steps} steps"
    )
    return 0


def _state(found: Contents) -> dict[str, Any]:
    return {
        "whole": found.damage is None,
        "first_step": found.first,
        "steps": len(found.steps),
        "skipped": sum(step[0].skipped for step in found.steps),
        "bytes": found.size,
        "tail_bytes": found.size - found.end,
        "damage": None if found.damage is None else str(found.damage),
    }


def _losses(found: Contents) -> dict[str, Any]:
    """The mean loss over the evaluations of the first and the last step that was not skipped."""
    means = [
        sum(record.loss_plus + record.loss_minus for record in step) / (2 * len(step))
        for step in found.steps
        if not step[0].skipped
    ]
    return {"first_loss": means[0] if means else None, "last_loss": means[-1] if means else None}


def _extent(found: Contents) -> str:
    """ "12 steps of 4 directions, 1 skipped, 1,700 bytes"."""
    state = _state(found)
    first = f" from step {found.first} on" if found.first else ""
    tail = f", {state['tail_bytes']} of them a tail that a resume drops" if state["tail_bytes"] else ""
    return (
        f"{state['steps']} steps of {found.header['directions']} directions{first}, {state['skipped']} skipped, "
        f"{found.size:,} bytes{tail}"
    )


def _lines(path: str, found: Contents) -> Iterator[str]:
    header, losses = found.header, _losses(found)
    yield f"{path}: {_extent(found)}"
    if found.damage is not None:
        yield f"DAMAGED: {found.damage}"
    yield "update: " + ", ".join(f"{name} {header[name]}" for name in _LAW if name in header)
    arena = header.get("arena", {})
    scales = sum(groups * rows for _, groups, rows in arena.values())
    yield f"base: {header.get('digest')}, {len(arena)} layers, {scales:,} scales train"
    for name in ("recipe", "versions"):
        yield f"{name}: " + ", ".join(f"{key} {value}" for key, value in header.get(name, {}).items())
    if losses["first_loss"] is not None:
        yield f"loss: {losses['first_loss']:.4f} at the first step, {losses['last_loss']:.4f} at the last"

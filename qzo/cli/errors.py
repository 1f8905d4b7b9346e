"""An error of a command as one line on standard error, and its exit status."""

import argparse
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from ..optim.journal import JournalError, read
from ..system import disk
from ..system.memory import explain, is_out_of_memory
from ..system.progress import showing
from ..system.ranks import RankLost, RanksDiverged
from ..system.stopping import Interrupted, status_of, stopping

BAD_INPUT = (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)
LESS_TEXT = "a shorter prompt or fewer --max-new-tokens need less"
LESS_MEMORY = (
    "--sequential holds one evaluation's activations at a time, a smaller --batch-size, --directions, "
    "--max-length or --seq-len less of them; qzo memory tells what is needed"
)


def reporting(execute: Callable[[argparse.Namespace], int | None], options: argparse.Namespace) -> int:
    """The exit status of execute(options); what it raises is one line, but a fault of our own keeps its traceback."""
    try:
        with showing(), stopping():
            return execute(options) or 0
    except Interrupted as stop:
        print(
            f"qzo: stopped after {stop.steps} steps, all of them saved; go on with: {resuming(options)}",
            file=sys.stderr,
        )
        return stop.status
    except KeyboardInterrupt as stop:
        if options.command == "generate":  # a way to end a text that goes on
            print("\nqzo: stopped", file=sys.stderr)
            return status_of(stop)
        journal = Path(vars(options).get("output_dir") or "") / "journal.qzo"
        saved = f"; {journal} is whole, go on with: {resuming(options)}" if journal.exists() else ""
        print(f"qzo: stopped outside the training steps{saved}", file=sys.stderr)
        return status_of(stop)
    except BAD_INPUT as error:
        print(f"qzo {options.command}: {disk.line_of(error)}", file=sys.stderr)
        return 2
    except (FloatingPointError, OSError, RanksDiverged, RankLost) as error:
        out = vars(options).get("output_dir")
        text = full_disk(error, options.command, out) if disk.full(error) else disk.line_of(error)
        print(f"qzo {options.command}: {text}", file=sys.stderr)
        return 2 if disk.unusable(error) else 1
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        print(
            f"qzo {options.command}: {explain(error, LESS_TEXT if options.command == 'generate' else LESS_MEMORY)}",
            file=sys.stderr,
        )
        return 1


def resuming(options: argparse.Namespace) -> str:
    """The command line that goes on with the run of this one."""
    line = ["qzo", *options.line]
    if options.command == "demo" and not any(word.startswith("--output-dir") for word in line):
        line += ["--output-dir", options.output_dir]  # it has chosen a name itself
    return shlex.join(line if "--resume" in line else [*line, "--resume"])


def full_disk(error: Exception, command: str, out: str | None) -> str:
    """One line for a full disk: where, and what to do after this command. out: its --output-dir, or None."""
    where = getattr(error, "filename", None) or out
    text = disk.WHAT.get(disk.full(error) or 0, str(error)) + (f" ({where})" if where else "")
    if command not in ("train", "train-diffusion", "demo"):
        kept = "; nothing was changed there: free space, or name an --output-dir elsewhere" if out else ": free space"
        return f"{text}{kept}, and run it again"
    steps = _saved(Path(out) / "journal.qzo") if out else None
    if steps is None:
        return f"{text}; no step is saved yet: free space, or name another --output-dir, and start again"
    saved = {0: "no step is saved yet", 1: "1 step is saved"}.get(steps, f"{steps} steps are saved")
    return f"{text}; {saved}: free space, then the same command with --output-dir {out} --resume"


def _saved(journal: Path) -> int | None:
    """Whole steps of a journal, None where there is none that a run would go on with."""
    try:
        found = read(journal)
    except (OSError, JournalError):
        return None
    return None if found is None else len(found[1])

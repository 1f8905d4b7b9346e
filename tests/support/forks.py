"""Python programs, each in a fork of one process that has imported torch, transformers and qzo, computed nothing."""

import json
import subprocess
import sys

from tests.support.paths import ROOT

FORKS = f"""
import json, os, sys
sys.path.insert(0, {str(ROOT)!r})
import torch, transformers, qzo.cli.main, qzo.checkpoints.load, qzo.training.loop  # once, for all that follow
for name, code, arguments in json.load(sys.stdin):
    child = os.fork()
    if not child:
        for number, ending in (1, "out"), (2, "err"):
            os.dup2(os.open(f"{{name}}.{{ending}}", os.O_WRONLY | os.O_CREAT), number)
        sys.argv = [name, *arguments]
        exec(compile(code, name, "exec"), {{"__name__": "__main__"}})
        sys.stdout.flush()
        os._exit(0)
    print(name, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
COMMAND = (
    "import sys; from qzo.cli.main import main; sys.exit(main(sys.argv[1:]))"  # a program: `qzo` and its arguments
)


def run(folder, programs):
    """name -> (0 if it ended well, what it printed, what it said on standard error) of each (name, code, arguments),
    run in `folder`, one after another."""
    done = subprocess.run(
        [sys.executable, "-c", FORKS],
        cwd=folder,
        input=json.dumps(programs),
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    codes = dict(line.rsplit(" ", 1) for line in done.stdout.splitlines())
    return {
        name: (int(codes[name]), (folder / f"{name}.out").read_text(), (folder / f"{name}.err").read_text())
        for name, _, _ in programs
    }

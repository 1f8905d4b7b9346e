"""`python -m tests.support.elastic N BASE DATA OUT`: `qzo train` on N ranks by torchrun's own launcher, with two kills.

The ranks are forks of this process, so that torch is imported once. Rank 2 is killed at step 70, and, started again,
rank 0 at step 141 behind a record's first half; the launcher starts all of them anew each time.
"""

import os
import signal
import sys
from pathlib import Path

import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from qzo.cli.main import main
from qzo.optim.optimizer import QZO

KILLS = ((2, 70), (0, 141))
OPTIONS = ["--max-steps", "200", "--batch-size", "5", "--directions", "1", "--learning-rate", "0.05"]


def train(base, data, out, kill=None):
    """What a rank does; kill: (rank, step, file to leave behind)."""
    torch.set_num_threads(1)
    if kill is not None and torch.distributed.is_torchelastic_launched() and int(os.environ["RANK"]) == kill[0]:
        finish = QZO._finish

        def killed(self, *results, **options):
            if self.param_groups[0]["step"] == kill[1]:
                Path(kill[2]).touch()
                if self.journal is not None:
                    self.journal._file.write(b"\0" * 13)
                os.kill(os.getpid(), signal.SIGKILL)
            return finish(self, *results, **options)

        QZO._finish = killed  # type: ignore[method-assign]
    code = main(["train", base, "--group-size", "32", "--data", data, "--output-dir", out, "--auto-resume", *OPTIONS])
    assert code == 0, code


def rank(base, data, out):
    """Of the first, second and third life."""
    marks = [f"{out}-killed-{step}" for _, step in KILLS]
    coming = [(*kill, mark) for kill, mark in zip(KILLS, marks, strict=True) if not Path(mark).exists()]
    train(base, data, out, coming[0] if coming else None)


def launch(count, *arguments):
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=int(count),
        run_id="qzo",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=2,
        start_method="fork",
    )
    elastic_launch(config, rank)(*arguments)


if __name__ == "__main__":
    launch(*sys.argv[1:5])
    train(sys.argv[2], sys.argv[3], sys.argv[4] + "-alone")

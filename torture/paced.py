"""``python -m torture.paced ARGUMENTS``: `muse_fast.pretrain` with a pause before every step.

Steps of a toy run take milliseconds: without pauses, on a busy machine, the run can end before the harness sends its
signal.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from muse_fast import pretrain
from muse_fast.batch import Views
from muse_fast.pretraining.trainer import Trainer
from muse_fast.runtime.cli import run
from muse_fast.training.report import Metrics

PAUSE = 0.15  # seconds


def main(argv: Sequence[str] | None = None) -> int:
    train_step = Trainer.train_step

    def paced_step(trainer: Trainer, *views: Views, measure: bool = True) -> Metrics:
        time.sleep(PAUSE)
        return train_step(trainer, *views, measure=measure)

    Trainer.train_step = paced_step  # type: ignore[method-assign, assignment]
    return run(pretrain.main, argv)


if __name__ == "__main__":
    sys.exit(main())

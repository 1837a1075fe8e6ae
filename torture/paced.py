"""``python -m torture.paced ARGUMENTS``: `muse_fast.pretrain`, resting before every step.

Steps of a toy run take milliseconds. On a busy machine the run would be over before a harness has sent its signal.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from muse_fast import pretrain
from muse_fast.batch import Views
from muse_fast.pretraining.trainer import Metrics, Trainer
from muse_fast.runtime.cli import run

REST = 0.15  # seconds


def main(argv: Sequence[str] | None = None) -> int:
    train_step = Trainer.train_step

    def rested(trainer: Trainer, *views: Views, measure: bool = True) -> Metrics:
        time.sleep(REST)
        return train_step(trainer, *views, measure=measure)

    Trainer.train_step = rested  # type: ignore[method-assign]
    return run(pretrain.main, argv)


if __name__ == "__main__":
    sys.exit(main())

"""``python -m torture.paced COMMAND ARGUMENTS``: `pretrain` or `finetune` with a pause before every step.

Steps of a toy run take milliseconds: without pauses, on a busy machine, the run can end before the harness sends its
signal.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

from muse_fast.training.report import Metrics
from torture.toy import COMMANDS, Step

PAUSE = 0.15  # seconds


def main(argv: Sequence[str]) -> int:
    name, *arguments = argv
    COMMANDS[name].wrap_step(paced)
    return COMMANDS[name](arguments)


def paced(train_step: Step) -> Step:
    def paced_step(trainer: Any, *batch: Any, measure: bool = True) -> Metrics:
        time.sleep(PAUSE)
        return train_step(trainer, *batch, measure=measure)

    return paced_step


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""``python -m muse_fast.prepare SOURCE OUT [key=value ...]``: convert slides or labelled images to a ROI set.

``prepare inspect DIR`` describes the dataset in a folder, ``prepare audit SET OTHER ...`` lists the slides and patients
that two sets share.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from muse_fast.preparing import audit, command, inspection
from muse_fast.runtime.cli import run


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["audit"]:
        return audit.main(arguments[1:])
    if arguments[:1] == ["inspect"]:
        return inspection.main(arguments[1:])
    return command.main(arguments)


if __name__ == "__main__":
    raise SystemExit(run(main))

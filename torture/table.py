"""The rows, in the order of ``docs/reliability.md``."""

from __future__ import annotations

from torture import checkpoints, data, outlines, ranks, runs, security

ROWS = sorted([*checkpoints.ROWS, *runs.ROWS, *ranks.ROWS, *security.ROWS, *data.ROWS, *outlines.ROWS], key=lambda row: row.name)
NAMES = [row.name for row in ROWS]

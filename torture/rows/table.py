"""All rows, in the order of ``docs/reliability.md``."""

from __future__ import annotations

from torture.rows import checkpoints, data, operators, outlines, ranks, runs, security, settings, slides, vectors

_ORDER = "CSDTUKO"
_MODULES = (checkpoints, runs, security, data, ranks, settings, operators, outlines, slides, vectors)

ROWS = sorted(
    [row for module in _MODULES for row in module.ROWS] + operators.NOT_APPLICABLE,
    key=lambda row: (_ORDER.index(row.name[0]), row.name),
)
NAMES = [row.name for row in ROWS]

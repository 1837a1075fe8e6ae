"""Everything that can go wrong in a run of ten days, done to the real commands: ``python -m torture [ROW ...]``.

One harness per promise of ``docs/reliability.md``. Tests of the suite use the same helpers and, in quick form, the same
harnesses.
"""

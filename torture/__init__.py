"""Do to the real commands everything that can go wrong in a run of ten days: ``python -m torture [ROW ...]``.

``torture.rows`` has one harness per promise in ``docs/reliability.md``. The test suite uses the same helpers, and the
same harnesses in quick form.
"""

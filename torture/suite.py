"""Count tests of the suite, for rows whose faults the suite injects."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from torture.harness import Outcome

ROOT = Path(__file__).parents[1]


def tests(*selection: str, **variables: str) -> Outcome:
    """Run tests: each is an injected fault, survived if the test passes. Skipped tests do not count.

    Args:
        variables: added to their environment.
    """
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")} | variables
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.xml"
        options = ["-q", "-p", "no:cacheprovider", "--tb=line", f"--junitxml={results}"]
        subprocess.run(
            [sys.executable, "-m", "pytest", *options, *selection], cwd=ROOT, env=environment, capture_output=True
        )
        cases = list(ElementTree.parse(results).getroot().iter("testcase"))
    skipped = [case for case in cases if case.find("skipped") is not None]
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    ran = len(cases) - len(skipped)
    notes = [f"FAILED {case.get('name')}" for case in failed[:5]]
    notes += [f"{len(skipped)} skipped"] if skipped else []
    return Outcome(ran, ran - len(failed), "; ".join(notes))

"""The docs describe every option of every source."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from muse_fast.sources import source_kinds

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("kind", source_kinds())
def test_the_docs_describe_every_option(kind: str) -> None:
    """Between backticks, in the section with the source's command."""
    page = re.sub("```.*?```", "", (DOCS / ("prepare.md" if kind == "wsi" else "datasets.md")).read_text(), flags=re.S)
    sections = [page] if kind == "wsi" else [text for text in page.split("\n## ") if f" {kind}:" in text]
    code = " ".join(re.findall("`([^`]+)`", "\n".join(sections)))
    assert {one.name for one in fields(source_kinds()[kind].Options)} - set(re.findall(r"\w+", code)) == set()

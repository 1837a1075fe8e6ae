"""Names of files as text, and how to compare them."""

from __future__ import annotations

import os
import unicodedata


def text_of(name: str | os.PathLike[str]) -> str:
    r"""A name or path as text that can be encoded, whatever the locale.

    The system allows any bytes in a name; Python represents those that its locale cannot decode by characters that
    cannot be written. Here UTF-8 is decoded in every locale, and other bytes are shown as ``\xe4``.
    """
    return os.fspath(name).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def key_of(name: str | os.PathLike[str]) -> str:
    """The same text for names that look the same: systems and programs write accents in one character or in two."""
    return unicodedata.normalize("NFC", text_of(name))

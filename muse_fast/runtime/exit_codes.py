"""The exit codes of all commands; 0 is success."""

from __future__ import annotations

FOUND = 1  # doctor found problems that it did not repair; audit found shared slides or patients
USER_ERROR = 2  # an error in the input or the settings, or a full disk; one message on stderr
NON_FINITE = 3  # a loss or gradient is NaN or infinite
STALLED = 4  # a rank waited too long for another
STOPPED = 75  # stopped on request after writing a checkpoint; the same command continues
INTERRUPTED = 130  # by Ctrl-C, as shells report it

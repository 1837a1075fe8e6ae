"""The version: at the bottom of the package, so that a file that records it imports nothing else."""

__version__ = "0.1.0"

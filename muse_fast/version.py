"""The version, in a file of its own: those that record it import nothing else."""

__version__ = "0.1.0"

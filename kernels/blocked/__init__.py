"""The ops in plain PyTorch, block by block: on any device and dtype, with no large intermediate."""

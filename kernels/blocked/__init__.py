"""The ops in plain PyTorch, block by block: for any device and dtype, without large intermediates."""

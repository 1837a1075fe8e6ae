"""Fused Triton kernels for DINO-style training. They need torch and triton, and nothing of muse_fast: see README.md."""

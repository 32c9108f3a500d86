"""Kernels for NVIDIA GPUs in Triton and Gluon, one idea a file. Only this room imports Triton, and only `ops/`
and `bench/` import this room, when a CUDA tensor arrives: everything runs, slower, without it.
"""

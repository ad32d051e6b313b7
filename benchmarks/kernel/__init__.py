"""Compiled kernels, counted, modelled and timed: `bench_kernels`, and `tools/tune_kernels.py`."""

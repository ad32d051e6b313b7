"""Compiled kernels, counted, modelled and timed: `bench_kernels`, `tune_kernels`."""

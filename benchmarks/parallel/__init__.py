"""A head over several devices: `bench_parallel`."""

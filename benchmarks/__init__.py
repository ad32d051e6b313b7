"""`python benchmarks/bench_*.py`. What they share is in `common`, the rest by subject."""

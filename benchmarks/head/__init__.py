"""Log-probabilities from hidden states and a head: `bench_linear`."""

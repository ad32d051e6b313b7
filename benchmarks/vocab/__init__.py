"""Log-probabilities from logits over vocabulary sizes: `bench_vocab`."""

"""A DPO step of a real model: `bench_dpo_step`."""

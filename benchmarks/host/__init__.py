"""What calls cost on the host: `bench_host`."""

"""What every benchmark uses: peers, batches, plans, goals, reports, measuring, command line."""

"""What every benchmark uses: peers, cases, goals, reports, measuring, the command line."""

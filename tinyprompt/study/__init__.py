"""Studies: a grid of tuning runs, its rows, its table and its plots."""

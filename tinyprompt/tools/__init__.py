"""What surrounds tuning: checks, benchmarks, exports, pictures. Nothing below knows of it."""

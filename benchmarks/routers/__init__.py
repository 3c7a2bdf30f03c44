"""What the tables of `benchmarks.routing` are made of."""

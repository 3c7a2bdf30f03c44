"""One script per claim, run by `python -m benchmarks NAME` from a checkout; results lie beside the scripts."""

"""The benchmarks: artists and classes, every method on the same harness."""

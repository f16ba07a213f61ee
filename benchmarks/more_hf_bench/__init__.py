"""The benchmarks: artists and classes, every method on the same harness. The library never imports them."""

"""Former home of the benchmarks, which are in `more_hf.bench`. Only `kd_data` is still imported from here."""

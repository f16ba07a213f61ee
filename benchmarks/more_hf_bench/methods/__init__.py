"""Unlearning methods, ours and published ones: one file a method, one line a method in `registry`."""

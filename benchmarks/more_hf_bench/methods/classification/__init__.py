"""Unlearning methods for image classifiers, ours and published ones."""

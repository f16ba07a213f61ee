"""Classifiers: find the head, collect its features, forget classes."""

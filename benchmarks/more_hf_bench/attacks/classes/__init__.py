"""Attacks on classifiers that forgot classes."""

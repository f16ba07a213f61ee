"""Concept erasure for diffusers pipelines."""

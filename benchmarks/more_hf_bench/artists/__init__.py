"""Styles and things forgotten by a text-to-image pipeline."""

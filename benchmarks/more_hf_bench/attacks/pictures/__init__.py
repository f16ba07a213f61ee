"""Attacks on pipelines: what they still draw of a forgotten style or thing."""

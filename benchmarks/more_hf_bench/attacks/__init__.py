"""Attacks: what somebody with a model, its answers or its weights gets back of what was forgotten."""

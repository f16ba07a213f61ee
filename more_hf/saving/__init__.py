"""Folders with a record, checks, the Hub, LoRA files and single-file checkpoints."""

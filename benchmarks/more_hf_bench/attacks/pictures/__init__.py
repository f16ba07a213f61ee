"""Attacks on pipelines that forgot a concept: `attack(victim, **settings)` yields `Result`s.

`victim` is a `victim.Victim`, the pipeline under attack; every setting has a default.
"""

"""Attacks on classifiers that forgot classes: `attack(victim, **settings)` yields `Result`s.

`victim` is a `victim.Victim`, the classifier under attack; every setting has a default.
"""

"""Stages read top to bottom: what a run does, in order."""

"""Verdicts on completions: extraction, exact comparison, then math-verify in a process that can be killed."""

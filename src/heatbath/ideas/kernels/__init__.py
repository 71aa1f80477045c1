"""Backends of the elementwise work on rows of logits that are not plain torch."""

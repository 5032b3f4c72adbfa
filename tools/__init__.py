"""Helpers that make test material: a small random base model and captioned images."""

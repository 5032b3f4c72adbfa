"""Bytes to pixels: which images are taken, and what becomes of them."""

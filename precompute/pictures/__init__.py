"""Bytes to pixels: which pictures are taken, and what becomes of them."""

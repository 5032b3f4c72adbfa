"""Reads the user's dataset into records: folders, lists and tars of images with captions."""

"""What is to be done: what the images are, where they go, what of an earlier run still holds."""

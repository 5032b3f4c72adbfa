"""What is to be done: what the pictures are, where they go, what of an earlier run still holds."""

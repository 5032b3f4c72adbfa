"""What the user has, as stable records: folders, lists and tars of images with captions."""

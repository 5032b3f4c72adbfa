"""What the user has, as stable records: folders, lists and tars of pictures with captions."""

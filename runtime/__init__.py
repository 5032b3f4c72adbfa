"""What every command stands on: files, errors, text for terminals. Imports nothing of ours."""

"""What SDXL is: its components one at a time, its conditioning, sampling, and file formats."""

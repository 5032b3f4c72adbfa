"""What SDXL is: its components one at a time, its conditioning, sampling, and file formats."""


class BaseError(ValueError):
    """A base model that is missing, incomplete or no SDXL. One clear line."""

"""The contract between the stages: the cache format, and the order samples are read in."""

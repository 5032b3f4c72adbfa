"""LoRA files of every kind: read, matched to a model, applied, written."""

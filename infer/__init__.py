"""Drawing pictures from prompts with a fine-tuned model."""

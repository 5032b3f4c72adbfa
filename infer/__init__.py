"""Drawing images from prompts with a fine-tuned model."""

"""Stage 1: images and captions to shards. The VAE and the text encoders work here."""

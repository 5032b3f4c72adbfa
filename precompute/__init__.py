"""Stage 1: pictures and captions to shards. The VAE and the text encoders work here."""

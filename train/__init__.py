"""Stage 2: shards to weights. Only the UNet lives here: no VAE, no text encoder."""

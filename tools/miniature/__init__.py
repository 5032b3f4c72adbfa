"""The miniature SDXL: drawn images, two tokenizers and text encoders, a VAE, a UNet, its score.

To read in this order: ``drawing`` (the world it knows), ``tokenizer``, ``text``, ``vae``, ``unet``
(the models of an SDXL, each as small as it can be), ``data`` (what it is trained on), ``score``
(whether it learned), ``build`` (all of it, from nothing) and ``demo`` (a fine-tune of it).
"""

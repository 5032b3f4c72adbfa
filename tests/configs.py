"""Configs of other trainers, in the shapes that people publish."""

from typing import Any

KOHYA_LORA = """
[model]
pretrained_model_name_or_path = "models/sdxl.safetensors"
vae = "models/vae.safetensors"

[network]
network_module = "networks.lora"
network_dim = 32
network_train_unet_only = true

[training]
max_train_epochs = 10
max_train_steps = 99
learning_rate = 1e-4
unet_lr = 3e-4
text_encoder_lr = 5e-5
optimizer_type = "AdamW8bit"
optimizer_args = ["weight_decay=0.05", "betas=(0.9, 0.99)"]
lr_scheduler = "cosine_with_restarts"
lr_scheduler_num_cycles = 3
lr_warmup_steps = 0.1
train_batch_size = 2
min_snr_gamma = 5
noise_offset = 0.0357
mixed_precision = "bf16"
full_bf16 = true
cache_latents = true
prior_loss_weight = 0.5
max_token_length = 225
save_every_n_epochs = 2
save_last_n_epochs = 4
sample_prompts = "prompts.txt"
sample_every_n_epochs = 1
output_dir = "out"
output_name = "cat"
wandb_api_key = "f00dcafe"
seed = 42
network_aplha = 16
"""

KOHYA_DATA = """
[general]
shuffle_caption = true
caption_extension = ".txt"
keep_tokens = 2
flip_aug = true

[[datasets]]
resolution = 768
batch_size = 4
enable_bucket = true
caption_dropout_rate = 0.1

  [[datasets.subsets]]
  image_dir = "cats"
  num_repeats = 10
  caption_prefix = "ohwx,"

  [[datasets.subsets]]
  image_dir = "more"
  keep_tokens = 0

[[datasets]]
resolution = [512, 768]
batch_size = 4

  [[datasets.subsets]]
  image_dir = "reg"
  is_reg = true
  class_tokens = "a cat"
  caption_dropout_rate = 0.1
"""

ONETRAINER_LORA: dict[str, Any] = {
    "__version": 10,
    "training_method": "LORA",
    "model_type": "STABLE_DIFFUSION_XL_10_BASE",
    "base_model_name": "stabilityai/stable-diffusion-xl-base-1.0",
    "output_model_destination": "models/cat.safetensors",
    "concept_file_name": "my-concepts.json",
    "resolution": "1024",
    "learning_rate": 3e-4,
    "learning_rate_scheduler": "COSINE",
    "learning_rate_warmup_steps": 100.0,
    "epochs": 20,
    "batch_size": 4,
    "gradient_accumulation_steps": 2,
    "train_dtype": "BFLOAT_16",
    "layer_filter_preset": "attn-mlp",
    "lora_rank": 16,
    "loss_weight_fn": "MIN_SNR_GAMMA",
    "save_every": 100,
    "save_every_unit": "STEP",
    "backup_after": 10,
    "sample_after": 10,
    "clip_grad_norm": None,
    "unet": {"weight_dtype": "FLOAT_16", "train": True},
    "text_encoder": {"train": False, "dropout_probability": 0.05},
    "optimizer": {"optimizer": "ADAMW", "weight_decay": 0.01, "beta1": 0.9},
    "sample_definition_file_name": "samples.json",
    "colour_jitter": 1,
}

CONCEPTS: list[Any] = [
    {
        "path": "cats",
        "balancing": 3.0,
        "loss_weight": 0.5,
        "image": {"enable_random_flip": True, "random_hue_max_strength": 0.1},
        "text": {"enable_tag_shuffling": True},
    },
    {"path": "off", "enabled": False},
]

SIMPLETUNER_LORA: dict[str, Any] = {
    "--model_family": "sdxl",
    "--model_type": "lora",
    "--lora_rank": 8,
    "--pretrained_model_name_or_path": "base",
    "--output_dir": "output/models",
    "--max_train_steps": 1000,
    "--num_train_epochs": 0,
    "--learning_rate": "1e-4",
    "--lr_scheduler": "polynomial",
    "--lr_warmup_steps": 100,
    "--optimizer": "adamw_bf16",
    "--train_batch_size": 2,
    "--gradient_checkpointing": "true",
    "--validation_prompt": "a cat on a mat",
    "--validation_resolution": "1024x1000,512x512",
    "--validation_guidance": 4.5,
    "--checkpoint_step_interval": 250,
    "--push_to_hub": "true",
    "--flux_guidance_mode": "constant",
}

BACKENDS: list[Any] = [
    {
        "id": "cats",
        "type": "local",
        "instance_data_dir": "cats",
        "caption_strategy": "textfile",
        "resolution": 1.0,
        "resolution_type": "area",
        "crop": True,
        "crop_aspect": "square",
        "repeats": 4,
        "cache_dir_vae": "cache/vae",
    },
    {"id": "text", "dataset_type": "text_embeds", "type": "aws", "aws_secret_access_key": "f00d"},
    {"id": "val", "dataset_type": "eval", "instance_data_dir": "held-out"},
]

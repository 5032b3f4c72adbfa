"""Where files of weights go in the programs that people draw with."""

LORA_PLACES = {
    "ComfyUI": "ComfyUI/models/loras",
    "A1111, Forge": "models/Lora",
    "InvokeAI": "its model manager imports it",
}
MODEL_PLACES = {
    "ComfyUI": "ComfyUI/models/checkpoints",
    "A1111, Forge": "models/Stable-diffusion",
    "InvokeAI": "its model manager imports it",
}


def listed(places: dict[str, str]) -> str:
    """The places in one line."""
    return "; ".join(f"{name}: {place}" for name, place in places.items())

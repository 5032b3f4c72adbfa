"""Where files of weights go in the programs that people draw with. Imports no torch."""

from pathlib import Path

from sdxl.lora.names import KOHYA, LORA

UIS = "ComfyUI, A1111, InvokeAI and sd-scripts"

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


def describe_weights(run: Path, base: str, full: bool) -> list[str]:
    """What the weights in a run's folder are for, and where their files go: a line each."""
    export = f"python cli.py export {run} --base {base}"
    if full:
        return [
            f"{run / 'unet'}: the UNet, for generate and diffusers",
            f"for {UIS}: {export} --out MODEL.safetensors ({_listed(MODEL_PLACES)})",
        ]
    lines = [f"{run / LORA}: the LoRA, for generate and diffusers (load_lora_weights)"]
    if (run / KOHYA).exists():
        kohya = f"{run / KOHYA}: the same LoRA, for {UIS}"
        return [*lines, f"{kohya} ({_listed(LORA_PLACES)})"]
    return [
        *lines,
        f"Warning: {UIS} apply a DoRA otherwise than it was trained, so no file for them is "
        f"written. They read the merged model: {export} --merge --out MODEL.safetensors",
    ]


def _listed(places: dict[str, str]) -> str:
    return "; ".join(f"{name}: {place}" for name, place in places.items())

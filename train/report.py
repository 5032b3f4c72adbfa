"""What a run says at its end: which file is for which program."""

from pathlib import Path

from sdxl.lora.names import KOHYA
from train.config import TrainConfig

UIS = "ComfyUI, A1111, InvokeAI and sd-scripts"


def describe_result(config: TrainConfig, path: Path) -> list[str]:
    """The lines to print; ``path`` is the LoRA file or the UNet folder that was written."""
    export = f"python cli.py export {path.parent} --base {config.base}"
    how = f"--unet {path}" if config.full else f"--lora {path}"
    generate = f"python cli.py generate --base {config.base} {how} --prompt TEXT --out IMAGES"
    if config.full:
        return [
            f"{path}: the UNet, for generate and diffusers",
            f"for {UIS}: {export} --out MODEL.safetensors",
            f"next: {generate}",
        ]
    kohya = path.with_name(KOHYA)
    if kohya.exists():
        for_uis = f"{kohya}: the same LoRA, for {UIS}"
    else:
        for_uis = (
            f"Warning: {UIS} apply a DoRA otherwise than it was trained, so no file for them is "
            f"written. They read the merged model: {export} --merge --out MODEL.safetensors"
        )
    return [
        f"{path}: the LoRA, for generate and diffusers",
        for_uis,
        f"next: {generate}",
    ]

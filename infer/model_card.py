"""The card of a model on the hub: what it is, how it was trained, how it is used. No torch.

It is made of what the weights and their run say of themselves, which has no path in it.
"""

import json
import math
import re
from dataclasses import dataclass

from sdxl.hub import is_hub_id
from sdxl.metadata import ModelMetadata
from sdxl.user_interfaces import LORA_PLACES, MODEL_PLACES

# Licenses that the hub knows by these ids; of another one it wants the name.
_LICENSES = (
    "apache-2.0 mit openrail openrail++ creativeml-openrail-m bigscience-openrail-m cc cc0-1.0 "
    "cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 "
    "cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 "
    "cc-by-nc-sa-4.0 bsd bsd-2-clause bsd-3-clause gpl gpl-2.0 gpl-3.0 lgpl lgpl-3.0 agpl-3.0 "
    "mpl-2.0 unlicense wtfpl unknown other"
)
_SPELLINGS = {  # in the metadata of single files
    "CreativeML Open RAIL++-M License": "openrail++",
    "CreativeML Open RAIL++-M": "openrail++",
    "CreativeML Open RAIL-M": "creativeml-openrail-m",
}


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What a card says; what is None or empty is left out."""

    repository: str  # OWNER/NAME
    is_lora: bool
    base: str | None  # a hub id, or a name
    license: str
    metadata: ModelMetadata
    diffusers_file: str | None  # a LoRA's for diffusers
    ui_file: str | None  # a LoRA's, or a whole model, for user interfaces
    has_fp16: bool = False  # a UNet's weights in fp16, beside others
    instance_prompt: str | None = None
    previews: tuple[tuple[str, str], ...] = ()  # file and prompt of each
    settings: tuple[tuple[str, str], ...] = ()  # those of the run that differ from the defaults
    facts: tuple[tuple[str, str], ...] = ()  # of the run

    @property
    def text(self) -> str:
        """README.md."""
        from huggingface_hub import ModelCardData

        base = self.base if self.base and is_hub_id(self.base) else None
        license, license_name = _license_fields(self.license)
        front = ModelCardData(
            base_model=base,
            base_model_relation=base and ("adapter" if self.is_lora else "finetune"),
            library_name="diffusers",
            pipeline_tag="text-to-image",
            tags=[
                "stable-diffusion-xl",
                "stable-diffusion-xl-diffusers",
                *(["lora"] if self.is_lora else []),
                "text-to-image",
                "diffusers",
                "shardtune",
            ],
            instance_prompt=self.instance_prompt,
            widget=[{"text": text, "output": {"url": name}} for name, text in self.previews if text]
            or None,
            license=license,
            license_name=license_name,
        )
        parts = [
            f"---\n{front.to_yaml()}\n---\n",
            f"# {self.repository.partition('/')[2]}",
            self._introduction(),
            *self._gallery(),
            "## Use it",
            self._places(),
            f"```python\n{self._code()}\n```",
            *self._notes(),
            "## Training",
            self._training(),
        ]
        return "\n\n".join(part.rstrip("\n") for part in parts if part) + "\n"

    def _introduction(self) -> str:
        kind = "A LoRA" if self.is_lora else "A fine-tuned UNet"
        of = f" of `{self.base}`" if self.base else ""
        if self.base and is_hub_id(self.base):
            of = f" of [{self.base}](https://huggingface.co/{self.base})"
        lines = [f"{kind}{of or ' of an SDXL model'}, trained with shardtune."]
        if self.instance_prompt:
            lines.append(f"Write `{self.instance_prompt}` in a prompt to call up what it learned.")
        return " ".join(lines)

    def _gallery(self) -> list[str]:
        if not self.previews:
            return []
        rows = [
            f"| ![{_cell(text)}]({name}) | {_cell(text)} |" if text else f"![previews]({name})\n"
            for name, text in self.previews
        ]
        head = ["| image | prompt |", "|---|---|"] if self.previews[0][1] else []
        return ["## Previews", "\n".join([*head, *rows])]

    def _places(self) -> str:
        places = LORA_PLACES if self.is_lora else MODEL_PLACES
        rows = ["| program | file | where |", "|---|---|---|"]
        if self.ui_file is not None:
            rows += [f"| {name} | `{self.ui_file}` | {at} |" for name, at in places.items()]
        if not self.is_lora:
            rows.append("| diffusers | `unet/`, `scheduler/` | the code below |")
        elif self.diffusers_file is not None:
            rows.append(f"| diffusers | `{self.diffusers_file}` | `load_lora_weights`, below |")
        return "\n".join(rows)

    def _code(self) -> str:
        base = json.dumps(self.base if self.base and is_hub_id(self.base) else "BASE")
        prompt = repr(self.instance_prompt or _first_prompt(self.previews) or "PROMPT")
        repository = json.dumps(self.repository)
        if self.is_lora:
            lines = [
                "import torch",
                "from diffusers import StableDiffusionXLPipeline",
                "",
                "pipeline = StableDiffusionXLPipeline.from_pretrained(",
                f"    {base}, torch_dtype=torch.float16",
                ').to("cuda")',
                "pipeline.load_lora_weights(",
                f"    {repository}, weight_name={json.dumps(self.diffusers_file or self.ui_file)}, "
                'adapter_name="lora"',
                ")",
                'pipeline.set_adapters(["lora"], adapter_weights=[1.0])  # its strength',
            ]
        else:
            variant = ', variant="fp16"' if self.has_fp16 else ""
            lines = [
                "import torch",
                "from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel",
                "",
                "unet = UNet2DConditionModel.from_pretrained(",
                f'    {repository}, subfolder="unet"{variant}, torch_dtype=torch.float16',
                ")",
                "pipeline = StableDiffusionXLPipeline.from_pretrained(",
                f"    {base}, unet=unet, torch_dtype=torch.float16",
                ').to("cuda")',
            ]
        return "\n".join([*lines, *self._scheduler_code(), f"image = pipeline({prompt}).images[0]"])

    def _scheduler_code(self) -> list[str]:
        """How a v-prediction or zero-SNR fine-tune is sampled, whatever its base says."""
        changes = []
        if self.metadata.prediction_type == "v_prediction":
            changes.append('prediction_type="v_prediction"')
        if self.metadata.rescale_betas_zero_snr:
            changes += ["rescale_betas_zero_snr=True", 'timestep_spacing="trailing"']
        if not changes:
            return []
        return [
            "pipeline.scheduler = type(pipeline.scheduler).from_config(",
            f"    pipeline.scheduler.config, {', '.join(changes)}",
            ")",
        ]

    def _notes(self) -> list[str]:
        notes = []
        if not (self.base and is_hub_id(self.base)):
            notes.append("`BASE` is the model that it was trained from, as a diffusers folder.")
        if self.ui_file is None:
            kind = "LoRA" if self.is_lora else "UNet"
            notes.append(
                f"There is no file for ComfyUI, A1111, Forge and InvokeAI here: this {kind} works "
                "in them as part of a whole model, which `python cli.py export` of shardtune makes."
            )
        if (chunks := self.metadata.long_captions or 1) > 1:
            notes.append(
                f"It was trained with prompts of up to {chunks} x 77 tokens; diffusers cuts them "
                "after the first 77."
            )
        return [" ".join(notes)] if notes else []

    def _training(self) -> str:
        own, rows = self.metadata, list(self.facts)
        if own.steps is not None:
            rows.insert(0, ("steps", f"{own.steps:,}"))
        if own.rank is not None:
            rows.append(("rank, alpha", f"{own.rank}, {own.alpha or own.rank:g}"))
        if own.buckets:
            num = sum(count for *_, count in own.buckets)
            side = math.sqrt(max(width * height for width, height, _ in own.buckets))
            rows += [
                ("images an epoch, with their repeats", f"{num:,}"),
                ("resolution", f"about {side:.0f} x {side:.0f} pixels"),
                ("buckets", ", ".join(f"{w}x{h}: {count:,}" for w, h, count in own.buckets)),
            ]
        if own.prediction_type is not None:
            rows.append(("prediction", own.prediction_type))
        lines = ["| | |", "|---|---|", *(f"| {name} | {_cell(value)} |" for name, value in rows)]
        if self.settings:
            lines += ["", "Settings of `python cli.py train` other than the defaults:", ""]
            lines += ["```", *(f"{name} {value}" for name, value in self.settings), "```"]
        return "\n".join(lines)


def _license_fields(name: str) -> tuple[str, str | None]:
    """The hub's id of a license, and the name of one that it has no id for."""
    license = _SPELLINGS.get(name, name)
    if license in _LICENSES.split():
        return license, None
    return "other", re.sub(r"[^a-z0-9.+-]+", "-", license.lower()).strip("-")


def _first_prompt(previews: tuple[tuple[str, str], ...]) -> str | None:
    return previews[0][1] if previews else None


def _cell(text: str) -> str:
    """Text in a cell of a table: without what Markdown or HTML would read as its own."""
    line = " ".join(text.split())
    return re.sub(r"([\\|`*_<>\[\]])", r"\\\1", line)

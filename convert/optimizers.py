"""Adafactor and other optimizers of the trainers, in terms of ours."""

from dataclasses import dataclass

ADAFACTOR_RATE = 1e-2  # relative to each weight: that of an Adafactor which paces itself
FULL_RATE = 1e-3  # relative to each weight, as in examples/full-24gb.toml


@dataclass(frozen=True)
class OptimizerChoice:
    """An optimizer of ours; a ``rate`` takes the place of the source's, for a ``reason``."""

    name: str
    note: str = ""
    rate: float | None = None
    reason: str = ""


def choose_adafactor(paces_itself: bool, is_relative: bool, is_lora: bool) -> OptimizerChoice:
    """What transformers' Adafactor becomes, by its relative_step and scale_parameter.

    Ours is torch's, whose rate is relative to each weight, and at most 1 / sqrt(step): at 1e-2
    that is what relative_step does there. An absolute rate it has not: AdamW's step at the same
    rate is the nearest, and a LoRA's state is small; for a whole UNet it would be too large.
    """
    if paces_itself:
        reason = "Adafactor paces itself: that is lr 0.01, relative to each weight"
        return OptimizerChoice("adafactor", rate=ADAFACTOR_RATE, reason=reason)
    if is_relative:
        return OptimizerChoice("adafactor")
    if is_lora:
        return OptimizerChoice("adamw", note="the nearest to Adafactor at an absolute rate")
    reason = "Adafactor's absolute rate becomes lr 0.001, relative to each weight"
    return OptimizerChoice("adafactor", rate=FULL_RATE, reason=reason)

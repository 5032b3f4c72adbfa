"""LoRA files that nobody should have made."""

import json
import struct
from pathlib import Path
from random import Random

import safetensors.torch
import torch

from sdxl.base import read_config
from sdxl.load import model_without_weights
from sdxl.lora.apply import (
    match_to_model,
    merged_weights,
    num_lora_parameters,
    read_num_chunks,
    read_schedule,
)
from sdxl.lora.names import UNET
from sdxl.lora.read import read_lora_file
from tests.mutations import Try, ending

BLOCK = "lora_unet_input_blocks_3_1_transformer_blocks_0_"
LAYER = f"{BLOCK}attn1_to_q"  # [32, 32]
CONV = "lora_unet_input_blocks_3_0_in_layers_2"  # [32, 16, 3, 3]
DOWN, UP = (4, 32), (32, 4)
Shapes = dict[str, tuple[int, ...]]
COMPLETE: dict[str, Shapes] = {
    "LoRA": {f"{LAYER}.lora_down.weight": DOWN, f"{LAYER}.lora_up.weight": UP},
    "DoRA": {
        f"{LAYER}.lora_down.weight": DOWN,
        f"{LAYER}.lora_up.weight": UP,
        f"{LAYER}.dora_scale": (1, 32),
    },
    "Tucker": {
        f"{CONV}.lora_down.weight": (2, 16, 1, 1),
        f"{CONV}.lora_mid.weight": (2, 2, 3, 3),
        f"{CONV}.lora_up.weight": (32, 2, 1, 1),
    },
    "LoHa": {f"{LAYER}.hada_w{n}_{s}": UP if s == "a" else DOWN for n in "12" for s in "ab"},
    "LoKr": {f"{CONV}.lokr_w1": (4, 4), f"{CONV}.lokr_w2_a": (8, 2), f"{CONV}.lokr_w2_b": (2, 36)},
    "GLoRA": {f"{LAYER}.{s}{n}.weight": UP if n == "1" else DOWN for s in "ab" for n in "12"},
    "(IA)^3": {f"{LAYER}.weight": (32,), f"{LAYER}.on_input": ()},
    "OFT": {f"{LAYER}.oft_blocks": (8, 4, 4), f"{LAYER}.rescale": (32, 1)},
    "BOFT": {f"{CONV}.oft_blocks": (4, 8, 4, 4)},
    "full": {f"{CONV}.diff": (32, 16, 3, 3), f"{CONV}.diff_b": (32,)},
    "norms": {f"{BLOCK}norm1.w_norm": (32,), f"{BLOCK}norm1.b_norm": (32,)},
}
PEFT: Shapes = {
    "unet.mid_block.attentions.0.proj_in.lora_A.weight": (4, 64),
    "unet.mid_block.attentions.0.proj_in.lora_B.weight": (64, 4),
}
LARGE = "1" + "0" * 400
SETTINGS = (
    "1",
    "[]",
    "{",
    "null",
    "[" * 100_000,
    '{"unet.lora_alpha": 8}',
    '{"unet.lora_alpha": [1]}',
    '{"unet.lora_alpha": "x"}',
    f'{{"unet.lora_alpha": {LARGE}}}',
    '{"unet.lora_alpha": 4, "unet.use_rslora": {}}',
    '{"unet.alpha_pattern": [1]}',
    '{"unet.alpha_pattern": {"(": 1}}',
    '{"unet.alpha_pattern": {"(.*.*)*x": 1}}',
    '{"unet.alpha_pattern": {"proj_in": null}}',
    f'{{"shardtune.long_captions": 1e99, "shardtune.alpha": {LARGE}}}',
    '{"shardtune.buckets": [[1, 2, 1e999]], "shardtune.prediction_type": "x"}',
)
DTYPES = (torch.float16, torch.bfloat16, torch.int32, torch.int64, torch.bool, torch.float8_e5m2)
CODES = ("F16", "F4", "F8_E8M0", "U64", "C64", "I8", "BOOL", "Q", 3, None)
VALUES = (torch.nan, torch.inf, 1e38, 0.0, -3.0)
MORE = ("alpha", "scalar", "on_input", "diff_b", "rescale", "hada_t1", "lokr_t2", "dora_scale")


def change_tensors(rng: Random, tensors: dict[str, torch.Tensor]) -> None:
    """Another shape, dtype, name or value of one tensor; one more; or one less."""
    name = rng.choice(list(tensors))
    tensor, module = tensors[name], name.partition(".")[0]
    shape = [*tensor.shape]
    kind = rng.randrange(7)
    if kind == 0 and shape:
        axis = rng.randrange(len(shape))
        size = shape[axis]
        shape[axis] = rng.choice((0, 1, 2, 3, abs(size - 1), size + 1, 2 * size, 4096))
        tensors[name] = torch.zeros(shape)
    elif kind == 1:
        tensors[name] = tensor[..., None] if rng.random() < 0.5 else tensor.flatten()
    elif kind == 2:
        tensors[name] = tensor.to(rng.choice(DTYPES))
    elif kind == 3:
        tensors[name] = torch.full(shape, rng.choice(VALUES))
    elif kind == 4:
        number = torch.tensor(rng.choice(VALUES))
        several = (number, number.long(), torch.ones(2), torch.ones(0), torch.ones(1, 32))
        tensors[f"{module}.{rng.choice(MORE)}"] = rng.choice(several)
    elif kind == 5:
        at = rng.randrange(len(name))
        letters = rng.choice(("", ".", "_", "\n", "é", "up"))
        tensors[name[:at] + letters + name[at + 1 :]] = tensors.pop(name)
    else:
        del tensors[name]


def change_header(rng: Random, data: bytes) -> bytes:
    """What the header says of one tensor, without regard to what is there."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    stated = header[rng.choice(list(header))]
    kind = rng.randrange(4)
    if kind == 0 and stated.get("shape"):
        axis = rng.randrange(len(stated["shape"]))
        stated["shape"][axis] = rng.choice((0, 1, 64, -1, 1 << 20, 1 << 62, 10**30, "4", None))
    elif kind == 1:
        stated["dtype"] = rng.choice(CODES)
    elif kind == 2 and "data_offsets" in stated:
        stated["data_offsets"][rng.randrange(2)] = rng.choice((0, -8, 4, 1 << 60, None))
    else:
        stated.update(rng.choice(({"x": 1}, {"shape": [0]}, {"dtype": "F32", "shape": []})))
    text = json.dumps(header).encode()
    length_field = rng.choice((len(text), len(text), 0, 1 << 50))
    return struct.pack("<Q", length_field) + text + data[8 + length :]


def change_bytes(rng: Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 2, 8))):
        changed[rng.randrange(min(len(changed), 900))] = rng.randrange(256)
    return bytes(changed[: rng.choice((len(changed), rng.randrange(len(changed))))])


def odd_file(rng: Random) -> bytes:
    if rng.random() < 0.1:
        tensors = {name: torch.randn(shape) for name, shape in PEFT.items()}
        return safetensors.torch.save(tensors, {"lora_adapter_metadata": rng.choice(SETTINGS)})
    tensors = {
        name: torch.tensor(1) if name.endswith("on_input") else torch.randn(shape) / 4
        for name, shape in COMPLETE[rng.choice(list(COMPLETE))].items()
    }
    how = rng.choice(("tensors", "tensors", "tensors", "header", "bytes", "nothing"))
    for _ in range(rng.choice((1, 1, 1, 2, 4)) if how == "tensors" else 0):
        if tensors:
            change_tensors(rng, tensors)
    apart = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    data = safetensors.torch.save(apart, {"a": "b"})
    if how == "header":
        return change_header(rng, data)
    return change_bytes(rng, data) if how == "bytes" else data


def fuzz_lora(work: Path, base: Path) -> Try:
    """Files of each kind of adapter: their tensors, headers, settings and bytes."""
    path = work / "odd.safetensors"
    unet = model_without_weights(UNET, read_config(base / "unet")).to_empty(device="cpu")
    for parameter in unet.parameters():
        parameter.data.normal_()

    def read() -> None:
        read_schedule(path), read_num_chunks(path), num_lora_parameters(path)
        file = read_lora_file(path)
        if file.merged_parts:
            dict(merged_weights(unet, UNET, [(file, 0.7)]))
        else:
            match_to_model(file, UNET, unet)

    def try_one(rng: Random) -> str:
        torch.manual_seed(rng.getrandbits(32))
        path.write_bytes(odd_file(rng))
        return ending(read, path)

    return try_one

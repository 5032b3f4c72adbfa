"""LoRA files of other tools: each kind is known and adds what it should; the rest is refused by its
name."""

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers import StableDiffusionXLPipeline
from loras import (
    Tensors,
    as_diffusers,
    as_peft,
    as_underscored,
    assert_close,
    fused,
    fused_by_diffusers,
    lora_factors,
    made_lora,
    state_after,
    text_lora,
)
from made import made_batch

from sdxl.base import open_base, read_config
from sdxl.load import load_text_encoders, load_unet, model_without_weights
from sdxl.lora.apply import (
    apply_loras,
    apply_text_loras,
    load_lora,
    match_to_model,
    num_lora_parameters,
)
from sdxl.lora.names import KOHYA, LORA, UNET
from sdxl.lora.read import read_lora_file
from sdxl.lora.write import diffusers_bytes
from sdxl.metadata import ModelMetadata
from sdxl.original_names import OriginalNames

RANK = 8


@pytest.fixture(scope="module")
def adapted(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A UNet with a LoRA of rank 8 and alpha 3, and the folder with its files."""
    folder = tmp_path_factory.mktemp("lora")
    return made_lora(base, folder, rank=RANK, alpha=3.0, targets="all"), folder


def write(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> Path:
    safetensors.torch.save_file({n: t.contiguous() for n, t in tensors.items()}, path, metadata)
    return path


def as_comfyui(unet: Any, alpha: float) -> Tensors:
    """peft's tensors under the names of the original layout, with an alpha, as OneTrainer writes
    them for ComfyUI."""
    names = OriginalNames("unet", dict(unet.config))
    state: Tensors = {}
    for module, factors in lora_factors(unet).items():
        key = names.key_of(f"{module}.weight")
        assert key is not None
        key = "diffusion_model." + key.removesuffix(".weight")
        state[f"{key}.lora_A.weight"], state[f"{key}.lora_B.weight"] = (
            factors["down"],
            factors["up"],
        )
        state[f"{key}.alpha"] = torch.tensor(alpha)
    return state


def comfyui_text_name(name: str) -> str:
    """The same of the names that ``text_lora`` gives; others are left as they are."""
    levels = r"lora_te([12])_text_model_encoder_layers_0_self_attn_(\w+)_proj\."
    clip = {"1": "clip_l", "2": "clip_g"}
    return re.sub(
        levels,
        lambda m: (
            f"text_encoders.{clip[m[1]]}.transformer.text_model.encoder.layers.0."
            f"self_attn.{m[2]}_proj."
        ),
        name,
    )


def forms(unet: Any, folder: Path, where: Path) -> dict[str, tuple[Path, float, str]]:
    """(file or folder, strength, kind) of each form of one LoRA."""
    kohya = safetensors.torch.load_file(folder / KOHYA)
    no_alpha = {name: tensor for name, tensor in kohya.items() if "alpha" not in name}
    in_fp16 = {n: t if "alpha" in n else t.half() for n, t in kohya.items()}
    dotted = {
        name.replace("lora_unet_", "diffusion_model."): tensor for name, tensor in no_alpha.items()
    }
    scaled = {n.replace(".alpha", ".scalar"): torch.tensor(0.25) for n in kohya if "alpha" in n}
    scaled |= kohya
    simple_tuner = {
        name.replace("lora_unet_", "lycoris_"): t for name, t in as_underscored(unet, 5.0).items()
    }
    settings = {"unet.r": RANK, "unet.lora_alpha": 3.0, "unet.use_rslora": True}
    bare = {"r": RANK, "lora_alpha": 3.0}
    plain = as_diffusers(unet)
    attention = {n: t for n, t in as_diffusers(unet, old=True).items() if "processor" in n}
    results = {
        "ours": (folder, 3 / RANK, "diffusers"),
        "diffusers, no settings": (write(where / "a.safetensors", plain), 1.0, "diffusers"),
        "diffusers, rslora": (
            write(where / "b.safetensors", plain, {"lora_adapter_metadata": json.dumps(settings)}),
            3 / RANK**0.5,
            "diffusers",
        ),
        "diffusers, of the UNet alone": (
            write(
                where / "c.safetensors",
                as_diffusers(unet, ""),
                {"lora_adapter_metadata": json.dumps(bare)},
            ),
            3 / RANK,
            "diffusers",
        ),
        "diffusers, old": (write(where / "d.safetensors", attention), 1.0, "diffusers"),
        "peft": (as_peft(unet, where / "e", r=RANK, lora_alpha=20), 20 / RANK, "peft"),
        "kohya": (folder / KOHYA, 3 / RANK, "kohya"),
        "kohya, no alpha": (write(where / "f.safetensors", no_alpha), 1.0, "kohya"),
        "kohya, fp16": (write(where / "g.safetensors", in_fp16), 3 / RANK, "kohya"),
        "underscored": (
            write(where / "h.safetensors", as_underscored(unet, 5.0)),
            5 / RANK,
            "kohya",
        ),
        "prefixed": (write(where / "i.safetensors", dotted), 1.0, "kohya"),
        "SimpleTuner": (write(where / "j.safetensors", simple_tuner), 5 / RANK, "kohya"),
        "ComfyUI": (write(where / "k.safetensors", as_comfyui(unet, 5.0)), 5 / RANK, "diffusers"),
        "a learned factor": (write(where / "l.safetensors", scaled), 3 / RANK / 4, "kohya"),
    }
    return results


FORMS = (
    "ours",
    "diffusers, no settings",
    "diffusers, rslora",
    "diffusers, of the UNet alone",
    "diffusers, old",
    "peft",
    "kohya",
    "kohya, no alpha",
    "kohya, fp16",
    "underscored",
    "prefixed",
    "SimpleTuner",
    "ComfyUI",
    "a learned factor",
)


@pytest.mark.parametrize("form", FORMS)
def test_each_form_adds_its_strength_times_its_product(
    base: Path, tmp_path: Path, adapted: tuple[Any, Path], form: str
) -> None:
    unet, folder = adapted
    path, scale, kind = forms(unet, folder, tmp_path)[form]
    assert read_lora_file(path).kind == kind
    again = load_unet(open_base(base).unet, torch.float32)
    load_lora(again, path)
    expected = fused(base, unet, scale)
    state = state_after(again)
    if form == "diffusers, old":
        expected = {n: t for n, t in expected.items() if re.search(r"attn\d", n)}
        state = {n: t for n, t in state.items() if n in expected}
    if form == "kohya, fp16":
        assert all(torch.allclose(state[n], t, atol=2e-3) for n, t in expected.items())
    else:
        assert_close(state, expected)


def drawn(unet: Any) -> torch.Tensor:
    batch = made_batch(2)
    added = {"text_embeds": batch.pooled, "time_ids": batch.time_ids}
    with torch.no_grad():
        times = torch.tensor([10, 700])
        out: torch.Tensor = unet(batch.latents, times, batch.prompt, added_cond_kwargs=added)[0]
    return out


def test_several_at_their_weights_draw_as_in_diffusers(base: Path, tmp_path: Path) -> None:
    made_lora(base, tmp_path / "one", rank=8, alpha=3.0, adapter="rslora", targets="all")
    made_lora(base, tmp_path / "two", rank=4, alpha=16.0, conv=True)
    pipeline = StableDiffusionXLPipeline.from_pretrained(str(base))
    with warnings.catch_warnings():  # peft's, of every second adapter
        warnings.simplefilter("ignore")
        for name in ("one", "two"):
            pipeline.load_lora_weights(str(tmp_path / name), adapter_name=name)
    pipeline.set_adapters(["one", "two"], [0.8, -0.5])
    unet = load_unet(open_base(base).unet, torch.float32)
    plain = load_unet(open_base(base).unet, torch.float32)
    apply_loras(unet, [(tmp_path / "one" / KOHYA, 0.8), (tmp_path / "two", -0.5)])
    assert not any(parameter.requires_grad for parameter in unet.parameters())
    results = []
    for item in (unet, pipeline.unet, plain):
        torch.manual_seed(5)
        results.append(drawn(item))
    assert torch.allclose(results[0], results[1], atol=1e-5)
    assert (results[0] - results[2]).abs().max() > 0.05


@pytest.mark.parametrize("naming", ["kohya", "ComfyUI"])
def test_text_encoders_take_their_parts_as_in_diffusers(
    base: Path, tmp_path: Path, naming: str
) -> None:
    torch.manual_seed(0)
    unet = made_lora(base, tmp_path, rank=4, alpha=16.0)
    both = safetensors.torch.load_file(tmp_path / KOHYA) | text_lora(4, 8.0, (32, 48))
    path = write(tmp_path / "both.safetensors", both)
    pipeline = StableDiffusionXLPipeline.from_pretrained(str(base))
    plain = load_text_encoders(open_base(base), torch.float32)
    encoders = load_text_encoders(open_base(base), torch.float32)
    pipeline.load_lora_weights(str(path))
    pipeline.set_adapters(pipeline.get_active_adapters(), 0.7)
    if naming == "ComfyUI":
        path = write(
            tmp_path / "both.safetensors", {comfyui_text_name(n): t for n, t in both.items()}
        )
    assert apply_text_loras(encoders, [(tmp_path / LORA, 1.0), (path, 0.7)]) == 4
    tokens = torch.randint(0, 500, (2, 77))
    expected = (pipeline.text_encoder, pipeline.text_encoder_2)
    for actual, reference, bare in zip(encoders, expected, plain, strict=True):
        with torch.no_grad():
            hidden = [item(tokens).last_hidden_state for item in (actual, reference, bare)]
        assert torch.allclose(hidden[0], hidden[1], atol=1e-5)
        assert (hidden[0] - hidden[2]).abs().max() > 0.05
    again = load_unet(open_base(base).unet, torch.float32)
    with pytest.warns(UserWarning, match=r"both.safetensors: .* 4 modules of the text encoders"):
        load_lora(again, path)
    assert_close(state_after(again), fused(base, unet, 16 / 4))
    assert num_lora_parameters(path) == num_lora_parameters(tmp_path / LORA)


def key(module: str, rank: int = 4, width: int = 32, out: int = 32) -> Tensors:
    return {
        f"{module}.lora_down.weight": torch.zeros(rank, width),
        f"{module}.lora_up.weight": torch.zeros(out, rank),
    }


def loha(module: str) -> Tensors:
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    shapes = ((32, 4), (4, 32), (32, 4), (4, 32))
    return {f"{module}.{n}": torch.randn(s) / 4 for n, s in zip(names, shapes, strict=True)}


BLOCK = "lora_unet_input_blocks_3_1_transformer_blocks_0_"
SD = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
OTHERS: dict[str, tuple[Tensors, str]] = {
    "SD 1": (key(SD, 4, 768), r"a LoRA of SD 1\).*down_blocks_0"),
    "SD 2": (key(SD, 4, 1024), r"a LoRA of SD 2\)"),
    "SDXL": (key(f"{BLOCK}attn2_to_k", 4, 2048), r"a LoRA of SDXL\).*\[32, 2048\].*\[32, 80\]"),
    "Flux": (key("lora_unet_double_blocks_0_img_attn_proj"), r"a LoRA of Flux\)"),
    "Flux of diffusers": (
        key("transformer.single_transformer_blocks.0.attn.to_q"),
        r"a LoRA of Flux\)",
    ),
    "SD3": (key("lora_unet_joint_blocks_0_x_block_attn_qkv"), r"a LoRA of SD3\)"),
    "SD 1 by its levels": (key(SD.replace("attn2", "attn1")), r"a LoRA of SD 1 or 2\)"),
    "Qwen-Image": (key("transformer.transformer_blocks.0.img_mlp.net.2"), r"a LoRA of Qwen-Image"),
    "Wan": (key("diffusion_model.blocks.0.self_attn.q"), r"a LoRA of Wan\)"),
    "LoHa": (loha(f"{BLOCK}attn1_to_q"), "holds LoHa, which .* `export --merge` puts it"),
    "LoKr": (
        {f"{BLOCK}attn1_to_q.lokr_w{n}": torch.ones(4, 4) for n in "12"},
        "holds LoKr, which can be neither trained on nor converted",
    ),
    "full": ({f"{BLOCK}attn1_to_q.diff": torch.zeros(4, 4)}, "holds full differences, which"),
    "norms beside a LoRA": (
        key(f"{BLOCK}attn1_to_q") | {f"{BLOCK}norm1.w_norm": torch.zeros(32)},
        "holds norms, which",
    ),
    "half a LoHa": (
        {f"{BLOCK}attn1_to_q.hada_w1_a": torch.ones(4, 4)},
        "damaged, or of an unknown kind: .*attn1_to_q has hada_w1_a",
    ),
    "peft's OFT": (
        {"unet.mid_block.attentions.0.proj_in.oft_R.weight": torch.ones(4, 4)},
        "an OFT in peft's form .*; LoRA, rsLoRA",
    ),
    "early OFT": (
        {f"{BLOCK}attn1_to_q.oft_diag": torch.zeros(4, 8, 8)},
        r"an OFT of an early LyCORIS version \(.*attn1_to_q.oft_diag\)",
    ),
    "integers": (
        {n: t.to(torch.int32) for n, t in key(f"{BLOCK}attn1_to_q").items()},
        "damaged: (down|up) of .*attn1_to_q is of type int32, not a float",
    ),
    "not a number": (
        key(f"{BLOCK}attn1_to_q") | {f"{BLOCK}attn1_to_q.alpha": torch.tensor(torch.nan)},
        "the alpha of .*attn1_to_q is no number",
    ),
    "two downs": (
        key(f"{BLOCK}attn1_to_q") | {f"{BLOCK}attn1_to_q.lora_A.weight": torch.zeros(4, 32)},
        "damaged: .*attn1_to_q has down twice",
    ),
    "embedding": ({"clip_g": torch.ones(4, 48)}, r"an embedding and no LoRA \(clip_g\)"),
    "embeddings alone": (
        {"bundle_emb.word.clip_g": torch.ones(4, 48)},
        "holds no LoRA weights: it has nothing but bundle_emb.word.clip_g and the like",
    ),
    "half": (
        {f"{BLOCK}attn1_to_q.lora_down.weight": torch.zeros(4, 32)},
        "attn1_to_q has no up weight",
    ),
    "other ranks": (
        key(f"{BLOCK}attn1_to_q") | {f"{BLOCK}attn1_to_q.lora_up.weight": torch.zeros(32, 5)},
        r"damaged: .*\[4, 32\] and \[32, 5\]",
    ),
    "no rank": (key(f"{BLOCK}attn1_to_q", 0), r"damaged: (down|up) of .*attn1_to_q is empty"),
    "alphas": (
        key(f"{BLOCK}attn1_to_q") | {f"{BLOCK}attn1_to_q.alpha": torch.ones(2)},
        "damaged: the alpha of .*attn1_to_q is no number",
    ),
    "other shape": (key(f"{BLOCK}attn1_to_q", 4, 33), r"weights of \[32, 33\], not \[32, 32\]"),
    "DoRA over the input": (
        key(f"{BLOCK}attn1_to_q") | {f"{BLOCK}attn1_to_q.dora_scale": torch.ones(1, 32)},
        "holds DoRA normed over its input, which",
    ),
    "DoRA in part": (
        key(f"{BLOCK}attn1_to_q")
        | key(f"{BLOCK}attn1_to_k")
        | {f"{BLOCK}attn1_to_q.dora_scale": torch.ones(32, 1)},
        "DoRA on some modules only",
    ),
    "twice": (
        key(f"{BLOCK}attn1_to_q")
        | key("lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"),
        "adapts down_blocks.1.* twice",
    ),
    "bias": (
        key(f"{BLOCK}attn1_to_q") | {f"{BLOCK}attn1_to_q.lora_up.bias": torch.ones(32)},
        "lora_up.bias is nothing of a LoRA that can be read",
    ),
    "no LoRA": ({"conv_in.weight": torch.ones(3)}, r"holds no LoRA weights \(e.g. conv_in.weight"),
    "text alone": (text_lora(4, 8.0, (32, 48)), "no weights for the UNet"),
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.filterwarnings("ignore:.*text encoders is not used")
def test_what_cannot_be_read_is_refused_by_its_name(base: Path, tmp_path: Path, kind: str) -> None:
    tensors, message = OTHERS[kind]
    path = write(tmp_path / "other.safetensors", tensors)
    unet = model_without_weights(UNET, read_config(base / "unet"))
    with pytest.raises(ValueError, match=rf"other.safetensors: .*{message}") as refused:
        load_lora(unet, path)
    assert "\n" not in str(refused.value)


def test_an_unknown_one_is_called_what_it_calls_itself(base: Path, tmp_path: Path) -> None:
    metadata = {"modelspec.architecture": "kandinsky/lora"}
    path = write(tmp_path / "other.safetensors", key("lora_unet_first_block"), metadata)
    unet = model_without_weights(UNET, read_config(base / "unet"))
    with pytest.raises(ValueError, match=r"a LoRA of kandinsky/lora\): it adapts first_block"):
        load_lora(unet, path)


def test_files_that_are_none(tmp_path: Path, adapted: tuple[Any, Path]) -> None:
    unet, folder = adapted
    peft = as_peft(unet, tmp_path / "peft", r=RANK)
    (peft / "adapter_config.json").unlink()
    torch.save({"a": torch.ones(1)}, tmp_path / "pickle.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((folder / LORA).read_bytes()[:-5])
    (tmp_path / "empty").mkdir()
    write(tmp_path / "none.safetensors", {})
    for path, message in {
        peft: r"adapter_config.json: missing, and with it the strength of adapter_model",
        tmp_path / "pickle.safetensors": "no LoRA file in safetensors format",
        tmp_path / "cut.safetensors": "no LoRA file in safetensors format",
        tmp_path / "none.safetensors": "holds no LoRA weights: it has no tensor at all",
        tmp_path / "empty": "pytorch_lora_weights.safetensors: no such LoRA file",
        tmp_path / "nothing": "nothing: no such LoRA file",
    }.items():
        with pytest.raises(ValueError, match=message):
            read_lora_file(path)
    (peft / "adapter_config.json").write_text('{"peft_type": "LOHA"}')
    with pytest.raises(ValueError, match=r"adapter_config.json: a LOHA, and no LoRA"):
        read_lora_file(peft)
    (peft / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"adapter_config.json: not valid JSON"):
        read_lora_file(peft)


def test_the_module_that_differs_keeps_its_rank_and_alpha(base: Path, tmp_path: Path) -> None:
    """As block-weighted and resized files have them."""
    made_lora(base, tmp_path, rank=4, alpha=16.0)
    kohya = safetensors.torch.load_file(tmp_path / KOHYA)
    module = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_k"
    name = next(n for n in kohya if n.endswith("transformer_blocks_0_attn1_to_k.alpha"))
    kohya[name] = torch.tensor(1.5)
    other = name.replace("to_k.alpha", "to_v")
    kohya[f"{other}.lora_down.weight"] = torch.randn(
        2, *kohya[f"{other}.lora_down.weight"].shape[1:]
    )
    kohya[f"{other}.lora_up.weight"] = torch.randn(len(kohya[f"{other}.lora_up.weight"]), 2)
    path = write(tmp_path / "mixed.safetensors", kohya)
    again = load_unet(open_base(base).unet, torch.float32)
    load_lora(again, path)
    scales = {"to_k": 1.5 / 4, "to_v": 16 / 2}
    expected = fused(base, again, 16 / 4)
    for item, scale in scales.items():
        name = f"{module.rsplit('.', 1)[0]}.{item}"
        expected[f"{name}.weight"] = fused(base, again, scale)[f"{name}.weight"]
    assert sorted({len(factors["down"]) for factors in lora_factors(again).values()}) == [2, 4]
    actual = match_to_model(read_lora_file(path), UNET, again)
    assert_close(state_after(again), expected)
    written = tmp_path / "written.safetensors"
    written.write_bytes(diffusers_bytes({UNET: actual}, ModelMetadata()))
    assert_close(fused_by_diffusers(base, written), expected)
    third = load_unet(open_base(base).unet, torch.float32)
    load_lora(third, written)
    assert_close(state_after(third), expected)


def test_what_is_bundled_with_a_lora_is_named_and_not_used(base: Path, tmp_path: Path) -> None:
    unet = made_lora(base, tmp_path, rank=4, alpha=16.0)
    tensors = safetensors.torch.load_file(tmp_path / KOHYA) | {
        "bundle_emb.cat.clip_l": torch.ones(2, 32),
        "bundle_emb.cat.clip_g": torch.ones(2, 48),
        "bundle_emb.dog.string_to_param.*": torch.ones(2, 48),
        "_aux.step": torch.ones(1),
    }
    path = write(tmp_path / "bundle.safetensors", tensors)
    again = load_unet(open_base(base).unet, torch.float32)
    with pytest.warns(UserWarning) as caught:
        load_lora(again, path)
    messages = [str(warning.message) for warning in caught]
    assert messages == [
        f"{path}: its bundled embeddings (bundle_emb.*: cat, dog) are not used",
        f"{path}: its auxiliary tensors (_aux.*: step) are not used",
    ]
    assert_close(state_after(again), fused(base, unet, 16 / 4))
    assert num_lora_parameters(path) == num_lora_parameters(tmp_path / LORA)

"""Settings that exclude each other, and caches that one run cannot mix: one line, by name."""

import math
from pathlib import Path
from typing import Any

import pytest
from made import CPU, config_of, made_sample, write_cache

from sdxl.base import Base, open_base
from shards.reader import Cache
from train.caches import open_data
from train.distributed import DistContext
from train.learner import build_learner
from train.option_values import CacheUse, Every

LORA = Path("lora.safetensors")
CPU_BF16: dict[str, Any] = {"precision": "bf16", "allow_cpu_bf16": True}
CPU_FP16: dict[str, Any] = {"precision": "fp16", "allow_cpu_bf16": True}
PURE: dict[str, Any] = {"full": True, "pure_bf16": True}

CHOICES: list[tuple[dict[str, Any], str]] = [
    ({"caches": ()}, "at least one cache"),
    ({"steps": None}, "either --steps or --epochs"),
    ({"steps": 1, "epochs": 1.0}, "either --steps or --epochs"),
    ({"resume": True, "overwrite": True}, "--resume and --overwrite"),
    ({"allow_changed_data": True}, "--allow-changed-data .* --resume"),
    ({"full": True, "rank": 4}, "--rank .* --full"),
    ({"full": True, "alpha": 4.0}, "--alpha .* --full"),
    ({"full": True, "targets": "all"}, "--targets .* --full"),
    ({"full": True, "conv": True}, "--conv .* --full"),
    ({"full": True, "init_lora": LORA}, "--init-lora .* --full"),
    ({"full": True, "adapter": "dora"}, "--adapter dora .* --full"),
    ({"full": True, "adapter": "rslora"}, "--adapter rslora .* --full"),
    ({"init_lora": LORA, "rank": 4}, "--init-lora .*--rank"),
    ({"init_lora": LORA, "alpha": 1.0}, "--init-lora .*--alpha"),
    ({"init_lora": LORA, "targets": "all"}, "--init-lora .*--targets"),
    ({"init_lora": LORA, "conv": True}, "--init-lora .*--conv"),
    ({"init_lora": LORA, "adapter": "dora"}, "--init-lora .*--adapter"),
    ({"ema_on_cpu": True}, "--ema-on-cpu.* --ema$"),
    ({"compile": True, "adapter": "dora"}, "--compile: DoRA cannot"),
    ({"preview_vae": True}, "--preview-vae.* --preview-every"),
    ({"full": True, "base_quant": "int8"}, "--base-quant .* --full"),
    ({"full": True, "base_quant": "nf4"}, "--base-quant .* --full"),
    ({"pure_bf16": True}, "--pure-bf16 .* --full"),
    ({**PURE, "precision": "fp16"}, "--pure-bf16 .* fp16"),
    ({**PURE, "precision": "fp32"}, "--pure-bf16 .* fp32"),
    ({**PURE, "optimizer": "prodigy"}, "--pure-bf16: prodigy .*--optimizer"),
    ({"fused_backward": True, "accumulate": 2}, "--fused-backward .*--accumulate"),
    ({"fused_backward": True, "precision": "fp16"}, "--fused-backward .*fp16"),
    ({"fused_backward": True, "optimizer": "prodigy"}, "--fused-backward: prodigy"),
    ({"fused_backward": True, "gpus": "2"}, "--fused-backward is for one process"),
]
RANGES: list[tuple[dict[str, Any], str]] = [
    *(({name: 0}, "must be at least 1, not 0") for name in ("rank", "steps", "batch_size")),
    *(({name: 0}, "must be at least 1, not 0") for name in ("accumulate", "max_skipped")),
    *(
        ({name: 0.0}, "must be above 0 and at most 1e6")
        for name in ("lr", "min_snr_gamma", "alpha")
    ),
    *(({name: 0.0}, "must be above 0 and at most 1e6") for name in ("huber_delta", "logit_std")),
    *(({"lr": value}, "must be above 0 and at most 1e6") for value in (math.nan, math.inf, 1e9)),
    *(({"ema": value}, "must be in 0..1, 1 excl") for value in (-0.1, 1.0, math.nan)),
    *(({"caption_dropout": value}, "must be in 0..1, 1 excl") for value in (-0.1, 1.0, math.nan)),
    *(({"noise_offset": value}, "must be") for value in (-1.0, math.nan)),
    *(({name: math.inf}, "must be finite") for name in ("weight_decay", "max_grad_norm")),
    *(({name: math.nan}, "must be finite") for name in ("logit_mean", "max_grad_norm")),
    *(
        ({"timestep_range": r}, "takes LOW,HIGH")
        for r in ((5, 5), (9, 1), (1,), (-1, 5), (1, 2, 3))
    ),
    *(({"gpus": value}, "takes a number") for value in ("0", "-1", "two")),
    ({"seed": 2**63}, "must be below"),
    ({"checkpoint_at": (5, 0)}, "takes steps from 1"),
]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        *CHOICES,
        *((item, f"--{next(iter(item)).replace('_', '-')} {kind}") for item, kind in RANGES),
    ],
    ids=str,
)
def test_settings_that_exclude_each_other_are_refused(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        config_of(**settings)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 120


@pytest.mark.parametrize(
    "settings",
    [
        {"full": True, "fused_backward": True, "pure_bf16": True, "optimizer": "adafactor"},
        {"fused_backward": True, "gpus": "1"},
        {"init_lora": LORA, "base_quant": "nf4"},
        {"ema": 0.9, "ema_on_cpu": True, "resume": True, "allow_changed_data": True},
        {"adapter": "dora", "conv": True, "rank": 4, "alpha": 2.0, "optimizer": "prodigy"},
        {"preview_vae": True, "preview_every": Every(5), "timestep_range": (0, 1)},
    ],
    ids=str,
)
def test_what_goes_together_is_taken(settings: dict[str, Any]) -> None:
    taken = config_of(**settings)
    assert {name: getattr(taken, name) for name in settings} == settings


@pytest.mark.parametrize(
    ("settings", "size", "message"),
    [
        (PURE, 1, "--pure-bf16 on a CPU: .*--allow-cpu-bf16 .*--precision bf16"),
        ({"fused_backward": True}, 2, "--fused-backward is for one process"),
        ({"full": True, "optimizer": "adafactor"}, 2, "--full .*--optimizer adafactor"),
        ({"full": True, "optimizer": "adamw8bit"}, 2, "--full .*--optimizer adamw8bit"),
        ({"full": True, "optimizer": "prodigy"}, 3, "--full .*--optimizer prodigy"),
        ({"full": True, **CPU_FP16}, 2, "--precision fp16 is for one process with --full"),
        ({**PURE, **CPU_BF16}, 2, "--pure-bf16 is for one process with --full"),
    ],
)
def test_what_the_processes_cannot_do_is_refused_before_anything_is_loaded(
    settings: dict[str, Any], size: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        build_learner(config_of(**settings), Base("no such base"), DistContext(CPU, 0, size))
    assert "\n" not in str(caught.value)


def test_what_is_no_interval_is_refused() -> None:
    for text in ("", "x", "-1", "1.5", "2 epochs", "ep", "1e3"):
        with pytest.raises(ValueError, match="is no interval: give steps"):
            Every.parse(text)


@pytest.mark.parametrize("text", ["0", "500", "12345678", "2ep", "0.5ep", "1.2345678ep"])
def test_an_interval_is_written_as_it_is_read(text: str) -> None:
    assert str(Every.parse(text)) == text


# Caches.


@pytest.fixture
def made_encoders(monkeypatch: pytest.MonkeyPatch) -> None:
    """The base holds the encoders that ``write_cache`` says it was made with."""
    names = ("vae", "text_encoder", "text_encoder_2")
    digests = dict.fromkeys(names, "made")
    monkeypatch.setattr("train.caches.encoder_digests_in_subprocess", lambda base: digests)


def open_two(base: Path, *uses: CacheUse, **settings: Any) -> list[Cache]:
    config = config_of(base, caches=uses, **settings)
    return open_data(config, open_base(base), DistContext(CPU))[0]


@pytest.mark.usefixtures("made_encoders")
def test_caches_that_cannot_be_mixed_are_refused(base: Path, tmp_path: Path) -> None:
    first = write_cache(tmp_path / "first", [made_sample("a.png")])
    longer = write_cache(tmp_path / "longer", [made_sample("a.png", prompt=(154, 80))])
    wider = write_cache(tmp_path / "wider", [made_sample("a.png", prompt=(77, 96))])
    other = write_cache(tmp_path / "other", [made_sample("a.png")], encoders="others")
    like = write_cache(tmp_path / "like", [made_sample("b.png")], dtype="bf16")
    assert [c.folder for c in open_two(base, CacheUse(first), CacheUse(like))] == [first, like]
    for folder, message in (
        (longer, "longer: its captions have 154 tokens, and those of .*first 77: encode both"),
        (wider, "wider: holds prompt embeddings of width 96, but .* takes 80"),
        (other, "other: made with another (vae|text_encoder) than .*first"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            open_two(base, CacheUse(first), CacheUse(folder))
        assert "\n" not in str(caught.value)
        with pytest.raises(ValueError, match=message):  # as a validation cache too
            open_two(base, CacheUse(first), val=folder)
    with pytest.raises(ValueError, match=r"other: made with another .* than .*base"):
        open_two(base, CacheUse(other))


@pytest.mark.usefixtures("made_encoders")
def test_a_masked_loss_needs_a_mask_somewhere(base: Path, tmp_path: Path) -> None:
    bare = write_cache(tmp_path / "bare", [made_sample("a.png")])
    masked = write_cache(tmp_path / "masked", [made_sample("b.png"), made_sample("c", mask=True)])
    with pytest.raises(ValueError, match="--masked-loss: no sample of the cache has a mask"):
        open_two(base, CacheUse(bare), masked_loss=True)
    assert len(open_two(base, CacheUse(bare), CacheUse(masked), masked_loss=True)) == 2


@pytest.mark.parametrize(
    "settings",
    [
        *("weight=0", "weight=-1", "weight=nan", "weight=inf", "weight=", "weight=x"),
        *("repeats=0", "repeats=-2", "repeats=1.5", "repeats=", "weight=1,repeats=0"),
        *("weight=2,weight=3", "repeats=2,weight=1,repeats=2"),
    ],
)
def test_a_use_of_a_cache_that_means_nothing_is_refused(settings: str) -> None:
    with pytest.raises(ValueError, match=f"^A,{settings}: .*(weight|repeats)"):
        CacheUse.parse(f"A,{settings}")


@pytest.mark.parametrize(
    ("text", "folder", "weight", "repeats"),
    [
        ("A", "A", 1, 1),
        ("A,weight=0.5", "A", 0.5, 1),
        ("A,repeats=3,weight=0.1234567", "A", 0.1234567, 3),
        ("in, out", "in, out", 1, 1),
        ("in,out,repeats=2", "in,out", 1, 2),
    ],
)
def test_commas_in_a_folders_name_are_its_own(
    text: str, folder: str, weight: float, repeats: int
) -> None:
    use = CacheUse.parse(text)
    assert use == CacheUse(Path(folder), weight, repeats)
    assert CacheUse.parse(str(use)) == use


@pytest.mark.usefixtures("made_encoders")
def test_a_misspelt_setting_is_no_folder(base: Path, tmp_path: Path) -> None:
    write_cache(tmp_path / "a,b", [made_sample("a.png")])
    (opened,) = open_two(base, CacheUse.parse(f"{tmp_path}/a,b,weight=2"))
    assert (opened.folder, opened.weight) == (tmp_path / "a,b", 2)
    with pytest.raises(ValueError, match="a,b,wieght=2: no such cache folder"):
        open_two(base, CacheUse.parse(f"{tmp_path}/a,b,wieght=2"))

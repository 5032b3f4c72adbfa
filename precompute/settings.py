"""The settings of the encode stage. Imports no torch: ``--help`` is made from them."""

import re
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import ClassVar, Literal

from runtime.options import option, parse_memory
from runtime.path_kinds import BASE, CACHE, HUB_DATASET, IMAGES, RUN, WEIGHTS, check_kind
from runtime.workers import check_gpus, rank_info
from sdxl.base import BASE_HELP, TOKENIZERS_HELP, check_base

MAX_CROPS = 1000
MAX_CHUNKS = 4000  # of captions an image: 1.3 GB in two bytes; an index counts to 4 GB
Dtype = Literal["fp16", "bf16", "fp32"]
CaptionFrom = Literal["files", "filename", "folder", "metadata"]
Dedupe = Literal["keep", "drop"]
ENDING = re.compile(r"[.]?[^\s./\\\0]+")
ImportFrom = Literal["kohya", "onetrainer", "simpletuner"]
VaeDtype = Literal["fp16", "bf16", "tf32", "fp32"]


@dataclass(frozen=True, kw_only=True)
class EncodeSettings:
    """Settings of one encode. Lengths in pixels, sizes in samples."""

    PANELS: ClassVar[dict[str, str]] = {
        "Essentials": "base out resolution dry_run",
        "Captions": "caption_extension caption_column caption_roles caption_from missing_caption "
        "empty_captions caption_prefix caption_suffix caption_lines wildcards wildcard_lists "
        "shuffle_tags keep_tokens tag_dropout long_captions",
        "Input": "import_ ignore image_column val_share repeat_folders min_size dedupe "
        "max_rejected rehash",
        "Size and crop": "bucket_step square squash",
        "Variants and masks": "flip crops masks mask_from_alpha",
        "Models": "vae tokenizers vae_dtype device gpus part batch_size fit threads",
        "Output": "dtype mean_only shard_size preview_prompts max_removed "
        "allow_other_dataset repack",
    }

    dataset: Path
    base: str = option(
        MISSING, BASE_HELP, metavar="BASE", aliases="--pretrained-model-name-or-path"
    )
    out: Path = option(MISSING, "Folder of the cache.", metavar="PATH", aliases="--output-dir")
    resolution: int = option(
        1024, "Target resolution: the area of a bucket is at most RESOLUTION x RESOLUTION pixels."
    )
    bucket_step: int = option(
        64, "Sides of the buckets are multiples of this many pixels.", aliases="--bucket-reso-steps"
    )
    square: bool = option(
        False, "Resize the shorter side to the resolution and cut out the center square."
    )
    squash: bool = option(False, "Stretch every image to a square.")
    val_share: float = option(
        0.0, "Share of the images, chosen by their key, that goes into a validation cache OUT/val."
    )
    caption_extension: str = option(
        "txt,caption",
        "Endings of the texts beside an image; the first one that exists is its caption.",
        metavar="EXT,...",
    )
    caption_from: CaptionFrom = option(
        "files",
        "Caption of an image that has none: none (files), its own name without ending, its "
        "folder's without repeats, as 10_NAME, or the description in its file (IPTC, XMP, EXIF, "
        "PNG).",
    )
    import_: ImportFrom | None = option(
        None,
        "Take latents and embeddings from the caches that another trainer left beside the images, "
        "and encode only the rest. Implies --mean-only.",
    )
    image_column: str = option(
        "",
        "Column or field of a list that names the image, or of a parquet file that holds it. "
        "Default: the first usual name that there is.",
        metavar="NAME",
    )
    caption_column: tuple[str, ...] = option(
        (),
        "Column or field with a caption, for each time it is given. Default: the first usual name "
        "that there is.",
        metavar="NAME",
    )
    ignore: tuple[str, ...] = option(
        (),
        "Leave out files and folders, for each time it is given: a name, or with a slash a path in "
        "DATASET, where * stands for any characters.",
        metavar="PATTERN",
    )
    caption_roles: str = option(
        "",
        "Take several texts per image, each in a role by which train --captions draws: SOURCE is "
        "a column or field, or with a dot the ending of a text beside the image, as in "
        "tags=.tags,short=.txt. Several --caption-column are roles by their own names.",
        metavar="ROLE=SOURCE,...",
    )
    empty_captions: bool = option(
        False, "Keep images whose caption is empty; they train the model without a prompt."
    )
    missing_caption: str = option(
        "reject",
        "What to do with an image without a caption: reject, empty, or this TEXT as its caption.",
        metavar="reject|empty|TEXT",
    )
    caption_prefix: str = option("", "Text put before each caption, with a space.", metavar="TEXT")
    caption_suffix: str = option("", "Text put behind each caption, with a space.", metavar="TEXT")
    caption_lines: bool = option(False, "Treat each line of a text file as a caption of its own.")
    shuffle_tags: int = option(
        0, "Number of random orders of each caption's comma-separated tags to cache."
    )
    keep_tokens: int = option(0, "Number of first tags that --shuffle-tags leaves in place.")
    tag_dropout: float = option(
        0.0, "Probability with which --shuffle-tags drops each tag that it may move."
    )
    wildcards: int = option(
        0, "Number of expansions of each caption with {a|b|2::c} to cache; 0 keeps it as it is."
    )
    wildcard_lists: Path | None = option(
        None,
        "Folder of lists for --wildcards: __NAME__ in a caption is a line of FOLDER/NAME.txt.",
        metavar="FOLDER",
    )
    repeat_folders: bool = option(
        False, "Repeat the images of folders named N_name N times per epoch."
    )
    min_size: int = option(0, "Reject images whose shorter side has fewer pixels.")
    dedupe: Dedupe = option(
        "keep",
        "What to do with images whose files are equal byte for byte: keep all, or drop all but the "
        "first by key. An image of train that equals one of val is dropped from train.",
    )
    masks: Path | None = option(
        None,
        "Folder of masks, under the paths or the names of their images, for images without a mask "
        "beside them.",
        metavar="FOLDER",
    )
    mask_from_alpha: bool = option(
        False, "Use an image's own alpha as its mask, unless it has a mask file."
    )
    flip: bool = option(False, "Cache a mirrored copy of each image too.", aliases="--flip-aug")
    crops: int = option(
        0,
        "Number of random crops of each image to cache in place of the center crop; 0 caches "
        "the center crop.",
    )
    long_captions: int = option(1, "Number of 77-token chunks per caption.")
    vae: str | None = option(
        None, "Use another VAE: its folder or file, or a base that contains it.", metavar="PATH"
    )
    tokenizers: Path | None = option(None, TOKENIZERS_HELP, metavar="FOLDER")
    vae_dtype: VaeDtype = option(
        "fp32",
        "VAE precision. tf32 (on NVIDIA GPUs from compute capability 8.0) and bf16 are faster and "
        "less exact. Latents that come out non-finite are encoded again in fp32.",
    )
    dtype: Dtype = option("fp16", "Precision of the stored tensors.")
    mean_only: bool = option(
        False,
        "Store only the mean of the VAE's posterior: a smaller cache, and the same latent in every "
        "epoch.",
    )
    preview_prompts: Path | None = option(
        None,
        "Prompt file for previews during training. Default: the prompts that the cache has.",
        metavar="FILE",
    )
    device: str = option(
        "auto", "Device to encode on: auto, cuda, cuda:N, mps or cpu.", metavar="DEVICE"
    )
    gpus: str | None = option(
        None,
        "Number of processes to start, one per GPU of this machine, or auto for all.",
        metavar="N|auto",
    )
    batch_size: int | None = option(
        None,
        "Images encoded at a time; each 1024 x 1024 image takes about 3 GB. Default: as the "
        "cache was encoded so far, else by the GPU's memory and the resolution, else 2.",
        aliases="--vae-batch-size",
    )
    fit: str | None = option(
        None,
        "Choose the batch size for this much GPU memory, for example 12GB, or for all that the GPU "
        "has (auto, the default).",
        metavar="SIZE|auto",
    )
    threads: int | None = option(
        None, "CPU threads per process. Default: as the cache was encoded so far, else all."
    )
    shard_size: int = option(512, "Maximum number of samples in a shard.")
    part: str | None = option(
        None,
        "Encode in parts, on any machines that share the folders: plan, then every part I/N (1/16, "
        "2/16, ...) in a process of its own, then finish.",
        metavar="plan|I/N|finish",
    )
    rehash: bool = option(
        False, "Read every file again, even if its size and modification time are unchanged."
    )
    repack: bool = option(
        False, "Rewrite the shards in the order of a fresh encode, copying what is still valid."
    )
    max_rejected: float = option(
        0.5,
        "Maximum share of images that may be rejected. Checked before anything is written, and "
        "again at the end for images that failed while they were encoded (then exit code 1).",
    )
    max_removed: float | None = option(
        None,
        "Maximum share of a cache's samples that may be removed; more is refused before "
        "anything is written. Default: 0.1, or 0.5 for a cache of fewer than 100 samples.",
    )
    allow_other_dataset: bool = option(False, "Replace a cache that was made from another dataset.")

    dry_run: bool = option(
        False, "Print what would be encoded, removed, cropped and rejected and its size, then exit."
    )

    def __post_init__(self) -> None:
        if self.square and self.squash:
            raise ValueError("--square and --squash exclude each other")
        check_gpus(self.gpus)
        if self.fit is not None:
            parse_memory(self.fit)
        minima = {"batch_size": 1, "shard_size": 1, "resolution": 1}
        minima |= {"shuffle_tags": 0, "keep_tokens": 0, "wildcards": 0, "min_size": 0, "crops": 0}
        for name, minimum in minima.items():
            value = getattr(self, name)
            if value is not None and value < minimum:
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag} must be at least {minimum}, not {value}")
        if not 1 <= self.long_captions <= 32:
            raise ValueError(f"--long-captions must be from 1 to 32, not {self.long_captions}")
        if self.crops > MAX_CROPS:
            raise ValueError(f"--crops must be at most {MAX_CROPS}, not {self.crops}")
        self._check_part()
        self._check_captions()
        if not all(self.ignore):
            raise ValueError("--ignore: an empty pattern leaves out nothing; give a name or a path")
        if self.import_ is not None:
            self._check_import()
            object.__setattr__(self, "mean_only", True)  # the others store no posterior
        if self.threads is not None and not 1 <= self.threads <= 1024:
            raise ValueError(f"--threads must be from 1 to 1024, not {self.threads}")
        if not 0 <= self.max_rejected <= 1:
            raise ValueError(f"--max-rejected must be in 0..1, not {self.max_rejected}")
        if self.max_removed is not None and not 0 <= self.max_removed <= 1:
            raise ValueError(f"--max-removed must be in 0..1, not {self.max_removed}")
        if not 0 <= self.val_share < 1:
            raise ValueError(f"--val-share must be in 0..1, 1 excluded, not {self.val_share}")
        if self.resolution % 8:
            raise ValueError(f"--resolution must be a multiple of 8, not {self.resolution}")

    def _check_captions(self) -> None:
        if self.wildcard_lists is not None and not self.wildcards:
            raise ValueError("--wildcard-lists needs --wildcards, the number of expansions")
        num_variants = max(1, self.wildcards) * max(1, self.shuffle_tags)
        if num_variants * self.long_captions > MAX_CHUNKS:
            of_wildcards = f" of --wildcards {self.wildcards}" if self.wildcards else ""
            raise ValueError(
                f"--shuffle-tags {self.shuffle_tags}{of_wildcards} of --long-captions "
                f"{self.long_captions} are more than {MAX_CHUNKS} chunks an image"
            )
        if not 0 <= self.tag_dropout < 1:
            raise ValueError(f"--tag-dropout must be in 0..1, 1 excluded, not {self.tag_dropout}")
        if self.tag_dropout and not self.shuffle_tags:
            raise ValueError("--tag-dropout goes with --shuffle-tags")
        if self.keep_tokens and not self.shuffle_tags:
            raise ValueError("--keep-tokens goes with --shuffle-tags")
        if self.caption_roles and self.caption_column:
            raise ValueError("--caption-roles names the columns; leave --caption-column out")
        roles = self.roles
        if len({*roles.values()}) < self.caption_roles.count("="):
            raise ValueError(f"--caption-roles {self.caption_roles!r} says a role or source twice")
        if ".json" in roles:
            raise ValueError("--caption-roles: of a .json name the field, not the file's ending")
        endings = self.caption_extension.split(",")
        if not all(ENDING.fullmatch(text.strip()) for text in endings) or ".json" in self.texts:
            raise ValueError(
                f"--caption-extension must be endings with commas between, such as txt,caption, "
                f"and not json, not {self.caption_extension!r}"
            )

    def _check_import(self) -> None:
        if self.import_ != "kohya":
            raise ValueError(
                f"--import {self.import_}: its caches are pickles, which may run any program when "
                "they are loaded, so they are never loaded; encode the images instead"
            )
        if self.squash or self.crops:
            flag = "--squash" if self.squash else "--crops"
            raise ValueError(f"--import excludes {flag}: the caches have a crop of their own")

    @property
    def texts(self) -> tuple[str, ...]:
        """The endings of texts beside an image, in lower case with their dot, the first first."""
        endings = self.caption_extension.lower().split(",")
        return tuple(dict.fromkeys("." + text.strip().removeprefix(".") for text in endings))

    def _check_part(self) -> None:
        if self.part is None:
            return
        if self.share is None and self.part not in ("plan", "finish"):
            raise ValueError(f"--part is plan, I/N such as 1/16, or finish, not {self.part}")
        if self.gpus not in (None, "1") or rank_info().size > 1:
            raise ValueError("--part is of one process: start a part for each GPU, without --gpus")

    @property
    def share(self) -> tuple[int, int] | None:
        """I and N of ``--part I/N``: this process writes each N-th shard from the I-th on."""
        match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", self.part or "")
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            return None
        return int(match[1]), int(match[2])

    @property
    def roles(self) -> dict[str, str]:
        """The role of the texts of each source, a column or field or, with a dot, a file's ending;
        empty where captions have no roles.

        Raises:
            ValueError: --caption-roles is of another form.
        """
        if not self.caption_roles:
            names = self.caption_column if len(self.caption_column) > 1 else ()
            return {name: name for name in names}
        roles = {}
        for part in self.caption_roles.split(","):
            role, _, source = map(str.strip, part.partition("="))
            if not role or not source or (source[0] == "." and not ENDING.fullmatch(source)):
                raise ValueError(
                    f"--caption-roles: {part.strip()!r} is no ROLE=COLUMN or ROLE=.ENDING, as in "
                    "tags=.tags,short=.txt"
                )
            roles[source.lower() if source[0] == "." else source] = role
        return roles

    @property
    def caption_columns(self) -> tuple[str, ...]:
        """The columns or fields that were named for captions."""
        return self.caption_column or tuple(name for name in self.roles if name[0] != ".")

    def check_inputs(self) -> None:
        """Refuse a dataset or a base that is something else, before anything is loaded.

        Raises:
            ValueError: says what it is.
        """
        remedies = {
            CACHE: f"it is encoded already: python cli.py train {self.dataset} --base {self.base}",
            RUN: "give the folder with the images that it was to learn from",
            BASE: "give it as --base, and here a folder of images",
            WEIGHTS: "give a folder of images",
        }
        if not str(self.dataset).startswith(HUB_DATASET):
            check_kind(self.dataset, IMAGES, remedies)
        if self.wildcard_lists is not None and not self.wildcard_lists.is_dir():
            raise ValueError(f"--wildcard-lists {self.wildcard_lists}: there is no such folder")
        if self.masks is not None and not self.masks.is_dir():
            raise ValueError(f"--masks {self.masks}: there is no such folder")
        check_base(self.base)

"""Opens the caches of a run, and refuses those that do not fit its base or each other."""

import warnings
from collections import Counter
from collections.abc import Sequence

from runtime.messages import pluralize
from sdxl.base import ENCODERS, Base
from sdxl.fingerprint import encoder_digests_in_subprocess
from shards.reader import Cache
from train.config import TrainConfig
from train.distributed import DistContext
from train.option_values import CacheUse, CaptionShares, part_of


def open_data(
    config: TrainConfig, base: Base, world: DistContext
) -> tuple[list[Cache], Cache | None]:
    """The training caches, and the validation cache if there is one.

    Raises:
        ValueError: one of them cannot be used; names the cache and the reason.
    """
    caches = [open_cache(use, "train") for use in config.caches]
    val = open_val(config, caches[0])
    for cache in caches if val is None else [*caches, val]:
        check_cache(cache, base)
        _check_alike(caches[0], cache)
    if world.is_main:
        for cache in caches:
            check_encoders(cache, base)
    if config.masked_loss and not any(has_masks(cache) for cache in caches):
        raise ValueError("--masked-loss: no sample of the cache has a mask")
    if config.captions:
        check_roles(caches, config.captions, world.is_main)
    return caches, val


def check_roles(caches: Sequence[Cache], shares: CaptionShares, warns: bool = True) -> None:
    """Refuse a share of a role that no sample of any cache has, and warn of samples without any
    of the roles, which give each of their captions equally often.

    Raises:
        ValueError: names the role, and the roles that there are.
    """
    counts = count_roles(caches)
    names = sorted({role for roles in counts for role in roles if role})
    for role, _ in shares.shares:
        if role not in names:
            roles_shown = f"there are {', '.join(names)}"
            if not names:
                roles_shown = (
                    "there are none; encode with --caption-roles or several --caption-column"
                )
            raise ValueError(
                f"--captions: no image has a caption in the role {role}: {roles_shown}"
            )
    drawn = {role for role, share in shares.shares if share > 0}
    num_without = sum(count for roles, count in counts.items() if not drawn & {*roles})
    if num_without and warns:
        warnings.warn(
            f"--captions: {num_without:,} of {counts.total():,} images have no caption in any of "
            "its roles; they give each of their captions equally often",
            stacklevel=2,
        )


def count_roles(caches: Sequence[Cache]) -> Counter[tuple[str, ...]]:
    """The number of samples by the roles of their captions."""
    counts: Counter[tuple[str, ...]] = Counter()
    for cache in caches:
        for shard in cache.shards():
            counts += shard.index.count_roles()
    return counts


def describe_roles(caches: Sequence[Cache], shares: CaptionShares) -> str:
    """The line of the dry run: what becomes of the shares where samples lack roles."""
    counts = count_roles(caches)
    parts = []
    for role, share in shares.shares:
        num = sum(count for roles, count in counts.items() if role in roles)
        parts.append(f"{role} {share / sum(s for _, s in shares.shares):.0%} ({num:,} images)")
    return f"captions by role: {', '.join(parts)}"


def open_cache(use: CacheUse, part: str) -> Cache:
    """The cache of a folder, or its ``train`` or ``val`` where it is split in two."""
    return Cache(part_of(use.folder, part), weight=use.weight, repeats=use.repeats)


def open_val(config: TrainConfig, train: Cache) -> Cache | None:
    """The validation cache: the one named, else the one beside the first training cache."""
    first, *others = (use.folder for use in config.caches)
    if config.val is None and any((folder / "val").is_dir() for folder in others):
        warnings.warn("only the first cache's val/ is evaluated; --val names another", stacklevel=2)
    if config.val is not None:
        val = open_cache(CacheUse(config.val), "val")
    elif train.folder != first and (first / "val").is_dir():
        val = Cache(first / "val")
    else:
        if config.eval_every:
            warnings.warn("--eval-every: there is no validation cache, so no eval", stacklevel=2)
        return None
    if not val.manifest["num_samples"]:
        warnings.warn(f"{val.folder}: holds no sample, so there is no eval", stacklevel=2)
        return None
    return val


def has_masks(cache: Cache) -> bool:
    """Whether any sample of the cache has a mask."""
    return any(
        "mask" in shard.index.sample_layout(shard.index.record(row)).tensors
        for shard in cache.shards()
        for row in range(len(shard.index))
    )


def _check_alike(first: Cache, other: Cache) -> None:
    """Refuse caches that one run cannot mix."""
    for name in ENCODERS:
        digests = {cache.manifest["recipe"][name]["digest"] for cache in (first, other)}
        if len(digests) > 1:
            raise ValueError(f"{other.folder}: made with another {name} than {first.folder}")
    tokens, other_tokens = (cache.manifest["text"]["tokens"] for cache in (first, other))
    if tokens != other_tokens:
        raise ValueError(
            f"{other.folder}: its captions have {other_tokens} tokens, and those of {first.folder} "
            f"{tokens}: encode both alike"
        )


def check_cache(cache: Cache, base: Base) -> None:
    """Refuse a cache of another shape than the base's UNet takes.

    Raises:
        ValueError: names the cache, what it holds, and what the UNet takes.
    """
    folder, unet = base.unet.path, base.unet.config
    text, latents = cache.manifest["text"], cache.manifest.get("latents", {})
    added = unet["projection_class_embeddings_input_dim"] - 6 * unet["addition_time_embed_dim"]
    for quantity, stored, taken in (
        ("prompt embeddings of width", text["depth"], unet["cross_attention_dim"]),
        ("pooled embeddings of width", text["pooled"], added),
        ("latent channels:", latents.get("channels"), unet["in_channels"]),
    ):
        if stored is not None and stored != taken:
            raise ValueError(
                f"{cache.folder}: holds {quantity} {stored}, but {folder} takes {taken}: "
                "encode the dataset with this base"
            )


def check_encoders(cache: Cache, base: Base) -> None:
    """Refuse a cache made with other encoders than the base's; warn of what cannot be compared.

    The base's files are hashed in a process of their own (and remembered): no file of an encoder
    is opened here.
    """
    recipe, missing = cache.manifest["recipe"], []
    if imported := cache.manifest.get("imported"):
        counts = " and ".join(f"{name} of {num:,}" for name, num in sorted(imported.items()))
        warnings.warn(
            f"{cache.folder}: imported, not checked to be of this base's encoders: {counts} of "
            f"{pluralize(cache.manifest['num_samples'], 'sample')}",
            stacklevel=2,
        )
    digests = encoder_digests_in_subprocess(base)
    for name in ENCODERS:
        if digests[name] is None:
            missing.append(name)
        elif name == "vae" and not recipe["vae"]["of_base"]:
            continue  # encoded with --vae: meant to be another one
        elif digests[name] != recipe[name]["digest"]:
            raise ValueError(
                f"{cache.folder}: made with another {name} than {base} holds; encode the dataset "
                "with this base, or train from the base it was made with"
            )
    if missing:
        warnings.warn(
            f"{base} has no {', '.join(missing)}: whether {cache.folder} was made with this base's "
            "cannot be checked",
            stacklevel=2,
        )

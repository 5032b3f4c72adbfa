"""The commands ``verify``, ``inspect`` and ``unpack``.

They are apart from ``cli.py``, whose help loads no torch.
"""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from precompute.sheets import write_sheets
from precompute.unpack import LIST, unpack
from runtime.errors import echo, is_quiet
from runtime.locks import locked
from runtime.messages import pluralize
from shards.format import CacheError
from shards.inspect import describe_contents, read_contents
from shards.manifest import LOCK, MANIFEST, read_manifest
from shards.reader import Cache
from shards.verify import drop_damaged, rebuild_manifest, verify


def caches_in(cache: Path) -> list[Path]:
    """The caches in a folder: itself, or its train and val."""
    parts = [cache / name for name in ("train", "val") if (cache / name).is_dir()]
    return [cache] if (cache / MANIFEST).exists() or not parts else parts


def verify_cache(folder: Path, repair: bool) -> bool:
    """Say what is damaged in one cache, and drop it; whether nothing is."""
    if not repair or not (folder / MANIFEST).exists():
        return _verify(folder, repair=False)
    with locked(folder / LOCK):  # or what was found to be damaged might have been encoded anew
        return _verify(folder, repair=True)


def _verify(folder: Path, *, repair: bool) -> bool:
    try:
        manifest = read_manifest(folder)
    except CacheError as error:
        if not (folder / MANIFEST).exists() and folder.name not in ("train", "val"):
            raise  # no cache at all: bad input, not damage
        if repair:
            manifest = rebuild_manifest(folder, error)
        echo(str(error))
        if not repair:
            return False
    num_shards = len(manifest["shards"])
    checks = tqdm(verify(folder, manifest), total=num_shards + 1, unit="shard", desc=folder.name)
    faults = [fault for shard_faults in checks for fault in shard_faults]
    for fault in faults:
        echo(str(fault))
    if repair and (faults or "digest" not in manifest):
        dropped = drop_damaged(folder, manifest, faults)
        for line in dropped:
            echo(line)
        if not (folder / MANIFEST).exists():
            echo("next: run the same encode again, it makes what was dropped")
    if not faults and "digest" in manifest:
        samples = manifest["num_samples"]
        summary = f"{pluralize(samples, 'sample')} in {pluralize(num_shards, 'shard')}, all whole"
        echo(f"{folder}: {summary}")
    return not faults and "digest" in manifest


def inspect_cache(
    folder: Path, sheets: Path | None, page: Path | None, base: str | None
) -> Counter[str]:
    """Say what one cache holds; draw its sheets into ``sheets``, write ``page``. With the base that
    the cache was encoded with, the page has the number of tokens of each caption. Returns how often
    it has each image, by digest."""
    cache = Cache(folder)
    num_shards = sum(1 for shard in cache.manifest["shards"] if shard["count"])
    *_, contents = tqdm(
        read_contents(cache), total=num_shards, unit="shard", desc=folder.name, leave=False
    )
    echo("\n".join(describe_contents(cache, contents)))
    if sheets is not None:
        for path in write_sheets(cache, sheets):
            echo(str(path))
    if page is not None:
        from pages.cache import write_cache_page

        count_tokens = None if base is None else _token_counter(cache, base)
        echo(f"{write_cache_page(cache, contents, page, count_tokens)}: open it in a browser")
    return contents.images


def num_common(train: Counter[str], val: Counter[str]) -> int:
    """How many images of train are in val too; both as counts by digest."""
    return sum(number for image, number in train.items() if image in val)


def unpack_cache(folder: Path, out: Path, vae: str | None, device: str) -> None:
    """Write the previews and captions of one cache into a folder."""
    with tqdm(unit="img", desc=folder.name, disable=is_quiet()) as bar:
        for done, total in unpack(folder, out, vae, device):
            bar.total = total
            bar.update(done - bar.n)
    echo(f"{out}: {pluralize(done, 'image')}, from {'a VAE' if vae else 'a linear map'}; {LIST}")


def _token_counter(cache: Cache, given: str) -> Callable[[str], int]:
    """Counts tokens as the encode of the cache did.

    Raises:
        ValueError: the base has another tokenizer.
    """
    from sdxl.base import open_base
    from sdxl.fingerprint import tokenizer_digest
    from sdxl.load import load_tokenizers
    from sdxl.text_encoders import count_tokens

    base = open_base(given)
    recipe = cache.manifest.get("recipe", {}).get("text_encoder", {})
    if recipe.get("tokenizer") != tokenizer_digest(base.tokenizer("tokenizer")):
        raise ValueError(f"--base {given}: {cache.folder} was encoded with another tokenizer")
    tokenizer, _ = load_tokenizers(base)
    return lambda text: count_tokens(tokenizer, text)

"""Bases from the Hugging Face hub, and weights to it. Imports no torch."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from runtime.messages import first_line
from sdxl import BaseError

MODELS = ("unet", "vae", "text_encoder", "text_encoder_2")
OTHERS = ("scheduler", "tokenizer", "tokenizer_2")
FP16_FILES = ["*.fp16.*"]
_WEIGHT_SUFFIXES = (".bin", ".ckpt", ".pt", ".msgpack", ".h5", ".onnx", ".safetensors")
_HUB_ID = re.compile(r"(?P<repo>[\w][\w.-]*/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")


class Snapshot:
    """One commit of a repository on the hub, in the client's local cache: that of the revision in
    ``OWNER/NAME@REVISION``, or of the main branch as it stands now.

    A branch may move while a command runs; the UNet of one commit with the VAE of the next would
    be another model, and no error. The commit is asked for once, here; each component is
    downloaded once, when it is first asked for. Without a connection the cache is used.

    Raises:
        BaseError: no hub id, or it cannot be downloaded.
    """

    def __init__(self, name_or_path: str) -> None:
        match = _HUB_ID.fullmatch(name_or_path)
        if match is None:
            raise BaseError(f"{name_or_path}: no such folder")
        self.name_or_path, self.repo = name_or_path, match["repo"]
        self._revision: str | None = match["revision"]
        self._fetched: set[str] = set()
        self.folder = self._download(["model_index.json"])
        self._revision = self.folder.name  # the client names a snapshot's folder by its commit

    @property
    def pinned(self) -> str:
        """OWNER/NAME@COMMIT."""
        return f"{self.repo}@{self._revision}"

    def fetch(self, component: str) -> Path:
        """The folder of a component: safetensors and configs, the fp16 files only where there are
        no others. It does not exist where the repository has no such component.

        Raises:
            BaseError: it cannot be downloaded.
        """
        if component not in self._fetched:
            patterns = _patterns(component)
            self._download(patterns, ignore_patterns=FP16_FILES)
            weights = (self.folder / component).glob("*.safetensors")
            has_weights = any(".fp16" not in path.name for path in weights)
            if component in MODELS and not has_weights:
                self._download(patterns)
            self._fetched.add(component)
        return self.folder / component

    def find_file(self, name: str) -> Path | None:
        """A single file of the repository; None if there is none, or it cannot be downloaded
        now."""
        from huggingface_hub import hf_hub_download

        try:
            return Path(hf_hub_download(self.repo, name, revision=self._revision))
        except (OSError, ValueError):
            return None

    def _download(self, patterns: list[str], **options: Any) -> Path:
        from huggingface_hub import snapshot_download

        with _as_base_error(
            f"{self.name_or_path}: no such folder, and could not be downloaded from the hub"
        ):
            return Path(
                snapshot_download(
                    self.repo, revision=self._revision, allow_patterns=patterns, **options
                )
            )


def cached_component(repo: str, component: str) -> Path | None:
    """A component's folder in the local hub cache; None if it is not there. Downloads nothing."""
    from huggingface_hub import snapshot_download

    patterns = _patterns(component)
    try:
        folder = snapshot_download(repo, local_files_only=True, allow_patterns=patterns)
    except (OSError, ValueError):  # not there, or not all of it
        return None
    path = Path(folder) / component
    return path if path.is_dir() else None


def is_hub_id(name: str) -> bool:
    """Whether a name has the form OWNER/NAME or OWNER/NAME@REVISION."""
    return _HUB_ID.fullmatch(name) is not None


def download_base(hub_id: str, out: Path, *, fp16: bool = False, file: str | None = None) -> Path:
    """Download a base of the hub into ``out``: configs, tokenizers and safetensors only, with one
    set of weights per model (fp16 if asked for, or if there are no others); or the single file
    ``file``, or the only one in the repository. Files of an earlier call are kept; when a
    connection breaks, the client tries again by itself.

    Returns the path to give as ``--base``.

    Raises:
        BaseError: no such repository, nothing in it that can be used, or a download that failed.
    """
    match = _HUB_ID.fullmatch(hub_id)
    if match is None:
        raise BaseError(f"{hub_id}: no hub id; one is OWNER/NAME, or OWNER/NAME@REVISION")
    repo, revision = match["repo"], match["revision"]
    if out.exists() and not out.is_dir():
        raise BaseError(f"{out}: not a folder")
    from huggingface_hub import HfApi, snapshot_download

    with _as_base_error(f"{repo}: could not be downloaded from the hub"):
        info = HfApi().model_info(repo, revision=revision, files_metadata=True)
        sizes = {sibling.rfilename: sibling.size for sibling in info.siblings or ()}
    names = pick_files(repo, sorted(sizes), fp16, file)
    with _as_base_error(f"{repo}: not whole in {out}, run again to go on"):
        # By the commit just listed: its files may change meanwhile.
        snapshot_download(
            repo, revision=info.sha, local_dir=out, allow_patterns=_escape_patterns(names)
        )
    for name in names:
        path = out / name
        if not path.is_file() or sizes[name] not in (None, path.stat().st_size):
            raise BaseError(f"{path}: not whole; run again to go on")
    for left in (out / ".cache").rglob("*.incomplete"):  # by a run that was killed
        left.unlink(missing_ok=True)
    return out if "model_index.json" in names else out / names[0]


class Pushed(NamedTuple):
    """What became of a push."""

    address: str
    replaced: list[str]  # names in the repository that had another file before
    is_private: bool  # as it was made, or as it was before


def push_files(repo: str, files: Mapping[str, Path], *, public: bool) -> Pushed:
    """Send ``files``, by their names there, to the repository OWNER/NAME, in one commit; it is
    created if it is not there, as a private one unless ``public``. Other files in it stay, and a
    private one stays private.

    Raises:
        ValueError: nobody is logged in, or the repository is public unasked.
        OSError: the hub refuses it, or cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token
    from huggingface_hub.errors import RepositoryNotFoundError

    if get_token() is None:
        raise ValueError(
            "nobody is logged in to the Hugging Face Hub: run `hf auth login`, or set HF_TOKEN to "
            "a token that may write"
        )
    api = HfApi(library_name="shardtune")
    with _as_push_error(f"{repo}: not pushed"):
        api.whoami()  # a token that is not valid is told apart from a repository that is not there
        try:
            info = api.model_info(repo)
        except RepositoryNotFoundError:
            info = None
    if info is not None and not info.private and not public:
        raise ValueError(
            f"{repo}: is there already, and public; --public sends it all the same, for all to see"
        )
    before = [] if info is None else [sibling.rfilename for sibling in info.siblings or ()]
    with _as_push_error(f"{repo}: not pushed"):
        if info is None:
            api.create_repo(repo, private=not public)
    with _as_push_error(f"{repo}: is there, and nothing in it was changed"):
        adds = [CommitOperationAdd(name, str(path)) for name, path in files.items()]
        api.create_commit(repo, adds, commit_message="Pushed by shardtune")
    is_private = not public if info is None else bool(info.private)
    return Pushed(f"{api.endpoint}/{repo}", sorted(files.keys() & before), is_private)


@contextmanager
def _as_push_error(failure: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the hub's client raises anything
        status = getattr(getattr(error, "response", None), "status_code", None)
        reasons = {
            401: "the hub does not know the token: run `hf auth login`, or set HF_TOKEN",
            403: "the token has no right to write there",
        }
        reason = reasons.get(status) if isinstance(status, int) else None
        if status is None and not isinstance(error, ValueError):
            reason = f"the hub could not be reached ({first_line(error)})"
        raise OSError(f"{failure}: {reason or first_line(error)}") from error


def pick_files(repo: str, names: list[str], fp16: bool, file: str | None) -> list[str]:
    """The files of a repository that make a base.

    Raises:
        BaseError: there are none, or several files could be meant.
    """
    singles = [name for name in names if "/" not in name and name.endswith(".safetensors")]
    if file is not None:
        if file not in names or not file.endswith(".safetensors"):
            raise BaseError(f"{repo}: has no {file} in safetensors (found: {_listed(singles)})")
        return [file]
    if "model_index.json" in names:
        picked = ["model_index.json"]
        for part in OTHERS:
            picked += [name for name in names if re.fullmatch(rf"{part}/[^/]+\.(json|txt)", name)]
        for part in MODELS:
            picked += [f"{part}/config.json"] * (f"{part}/config.json" in names)
            picked += _pick_weights(repo, names, part, fp16)
        return picked
    if len(singles) != 1:
        raise BaseError(
            f"{repo}: no diffusers folder (it has no model_index.json); name one of its files with "
            f"--file (found: {_listed(singles)})"
        )
    return singles


def _pick_weights(repo: str, names: list[str], part: str, fp16: bool) -> list[str]:
    """One set of weights of a model, whole or in numbered files with their list."""
    for use_fp16 in (True, False) if fp16 else (False, True):
        dot = r"\.fp16" if use_fp16 else ""
        weights = rf"{part}/(diffusion_pytorch_)?model{dot}(-\d+-of-\d+)?\.safetensors"
        listing = rf"{part}/(diffusion_pytorch_)?model\.safetensors\.index{dot}\.json"
        files = [name for name in names if re.fullmatch(weights, name)]
        if files:
            return files + [name for name in names if re.fullmatch(listing, name)]
    pattern = rf"{part}/(?:diffusion_pytorch_)?model\.([A-Za-z0-9_-]+)\.safetensors"
    variants = [name for name in names if re.fullmatch(pattern, name)]
    if len(variants) == 1:  # such as non_ema
        return variants
    if variants:
        raise BaseError(f"{repo}: its {part} has no plain safetensors, but {_listed(variants)}")
    others = [
        name for name in names if name.startswith(f"{part}/") and name.endswith(_WEIGHT_SUFFIXES)
    ]
    raise BaseError(
        f"{repo}: its {part} has no safetensors (found: {_listed(others)}); "
        "pickles are never loaded"
    )


def _escape_patterns(names: list[str]) -> list[str]:
    """Patterns that match these names alone."""
    return [re.sub(r"([*?[])", r"[\1]", name) for name in names]


def _listed(names: list[str]) -> str:
    return ", ".join(names[:8]) + ", ..." * (len(names) > 8) if names else "none"


def _patterns(component: str) -> list[str]:
    return [f"{component}/*.{end}" for end in ("json", "txt", "safetensors")]


@contextmanager
def _as_base_error(failure: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the hub's client raises anything
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BaseError(f"{failure}: {reason}") from error

"""What a file or folder is by its name alone: image, caption, mask, or no part of the set."""

import re

PICTURES = (  # of formats that encode opens; the content decides which one it is
    ".jpg",
    ".jpeg",
    ".jpe",
    ".jfif",
    ".jfi",
    ".jif",
    ".pjpeg",
    ".pjp",
    ".mpo",
    ".png",
    ".apng",
    ".webp",
    ".bmp",
    ".gif",
    ".tif",
    ".tiff",
    ".avif",
    ".avifs",
    ".jp2",
    ".j2k",
    ".j2c",
    ".jpc",
    ".jpf",
    ".jpx",
    ".ppm",
    ".pgm",
    ".pbm",
    ".pnm",
    ".heic",
    ".heics",
    ".heif",
    ".hif",
)
TEXTS = (".txt", ".caption")

_RAW = "3fr arw cr2 cr3 crw dcr dng erf fff gpr iiq kdc mef mos mrw nef nrw orf pef ptx raf raw rw2"
_RAW += " rwl sr2 srf srw x3f"
_VECTOR = "svg svgz eps ai cdr wmf emf"
_LAYERED = "psd psb xcf kra ora clip sai pdn afphoto procreate"
_HDR = "exr hdr pfm"
_OTHER = "pam tga icb vda vst qoi dds ico cur icns pcx dib sgi ras xbm xpm jxr wdp hdp bpg flif mng"
_OTHER += " jng jpm jxs fits dcm djvu ktx ktx2 pict"

# Images by their ending that are not opened. Content could not decide: Pillow takes the preview in
# a camera RAW file for the image, and a layered document for whatever its program flattened.
UNREAD = {
    f".{ending}": what
    for endings, what in (
        ("jxl", "a JPEG XL image"),
        (_RAW, "a camera RAW file"),
        (_VECTOR, "a vector drawing"),
        (_LAYERED, "a layered document"),
        (_HDR, "an HDR image"),
        (_OTHER, "an image of a format"),
    )
    for ending in endings.split()
}

# What operating systems, NAS boxes and file managers leave in folders; dot files are skipped too.
_SYSTEM = {
    "__macosx",
    "__pycache__",
    "@eadir",
    "@tmp",
    "#recycle",
    "#snapshot",
    "@recycle",
    "@recently-snapshot",
    "$recycle.bin",
    "recycler",
    "recycled",
    "system volume information",
    "lost+found",
    "network trash folder",
    "temporary items",
    "thumbnails",
    "_thumbnails",
    "thumbs.db",
    "ehthumbs.db",
    "ehthumbs_vista.db",
    "desktop.ini",
    "icon\r",
}

_ANY = re.IGNORECASE | re.DOTALL
_SEPARATORS = r"[-_. ]"
_MASK_BEHIND = re.compile(rf"(.+?){_SEPARATORS}+mask(?:label)?s?(?:{_SEPARATORS}?\d+)?", _ANY)
_MASK_BEFORE = re.compile(rf"masks?{_SEPARATORS}+(.+)", _ANY)
_MASK_FOLDER = re.compile(rf"(?:(.+?){_SEPARATORS}+)?mask(?:label)?s?", _ANY)
_TITLE = re.compile(r"[^-_.]+ +masks?|masks? +[^-_.]+", _ANY)
IMAGE_FOLDERS = ("images", "image", "imgs", "img", "pictures", "photos")


def is_picture(name: str) -> bool:
    # A hidden name such as ".png" has no suffix for pathlib, but it is a name like any other.
    return name.lower().endswith(PICTURES)


def unread_image(name: str) -> str:
    """What an image is that encode does not open, such as "a camera RAW file"; else empty."""
    return UNREAD.get("." + name.rpartition(".")[2].lower(), "") if "." in name else ""


def has_ending(path: str) -> bool:
    return "." in path.rpartition("/")[2]


def stem_of(path: str) -> str:
    """The path without the ending of its name; dots in folders are no endings."""
    folder, slash, name = path.rpartition("/")
    return folder + slash + (name.rpartition(".")[0] if "." in name else name)


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is the system's or a tool's, and no part of the set."""
    return name.startswith(".") or name.lower() in _SYSTEM


def hidden_part(path: str) -> str:
    """The path up to its first hidden name, a folder with a slash behind it; else empty."""
    parts = path.split("/")
    for number, part in enumerate(parts, 1):
        if is_hidden(part):
            return "/".join(parts[:number]) + ("/" if number < len(parts) else "")
    return ""


def is_title(path: str) -> bool:
    """Whether a name reads as words about a mask (``gas mask.txt``), where tools that write masks
    use other characters than spaces."""
    return _TITLE.fullmatch(stem_of(path).rpartition("/")[2]) is not None


def masked_stems(path: str) -> list[str]:
    """Paths, without ending, of the images that a file could be the mask of, likeliest first.

    ``x.mask.png``, ``x_mask.png`` and ``mask-x.png`` belong to ``x``, ``masks/x.png`` to ``x`` or
    ``images/x``, ``train_masks/x.png`` to ``train/x``; letter case does not matter.
    """
    folder, slash, stem = stem_of(path).rpartition("/")
    behind, before = _MASK_BEHIND.fullmatch(stem), _MASK_BEFORE.fullmatch(stem)
    names = [match[1] for match in (behind, before) if match]
    found = [folder + slash + name for name in names]
    parts = folder.split("/") if folder else []
    for place in reversed(range(len(parts))):
        match = _MASK_FOLDER.fullmatch(parts[place])
        if match:
            instead = [[match[1]]] if match[1] else [[], *([name] for name in IMAGE_FOLDERS)]
            for middle in instead:
                where = "/".join([*parts[:place], *middle, *parts[place + 1 :]])
                found += [f"{where}/{name}".lstrip("/") for name in (stem, *names)]
            break
    return found

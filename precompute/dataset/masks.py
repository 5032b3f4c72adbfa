"""Which files are masks, and of which images: by their names, in whatever way tools write them."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from precompute.dataset.names import TEXTS, is_picture, is_title, masked_stems, stem_of


@dataclass
class Masks:
    """Mask files by the path, without ending, of the images that they belong to.

    ``lone`` are named like masks and belong to no image: such a file is an image of its own where
    it has a caption of its own, else it is rejected. Never is it given another image's caption.
    """

    by_stem: dict[str, list[str]] = field(default_factory=dict)
    all: set[str] = field(default_factory=set)
    lone: set[str] = field(default_factory=set)

    def beside(self, path: str) -> str | None:
        """The mask of an image.

        Raises:
            ValueError: there are several.
        """
        found = self.by_stem.get(stem_of(path), [])
        if len(found) > 1:
            names = [name.rpartition("/")[2] for name in found]
            if names[0] == names[1]:
                names = found
            raise ValueError(f"both {names[0]} and {names[1]}: which is its mask?")
        return found[0] if found else None


def find_masks(paths: Iterable[str]) -> Masks:
    """Of all files of a folder or a tar.

    ``gas mask.png`` with ``gas mask.txt`` is an image with a title, whatever else is there.
    """
    paths = list(paths)
    pictures = [path for path in paths if is_picture(path)]
    titled = {stem_of(path) for path in paths if path.lower().endswith(TEXTS) and is_title(path)}
    candidates = {
        path: stems
        for path in pictures
        if "mask" in path.lower() and stem_of(path) not in titled and (stems := masked_stems(path))
    }
    masks = Masks()
    if not candidates:
        return masks
    exact = {stem_of(path) for path in pictures}
    lower: dict[str, list[str]] = {}
    for stem in exact:
        lower.setdefault(stem.lower(), []).append(stem)
    for path, stems in candidates.items():
        own = stem_of(path)
        matches = next(
            (found for stem in stems if (found := _matches(stem, own, exact, lower))), []
        )
        for stem in matches:
            masks.by_stem.setdefault(stem, []).append(path)
        (masks.all if matches else masks.lone).add(path)
    return masks


def _matches(stem: str, own: str, exact: set[str], lower: dict[str, list[str]]) -> list[str]:
    if stem in exact and stem != own:
        return [stem]
    return sorted(one for one in lower.get(stem.lower(), ()) if one != own)

"""``convert``: from the config of another trainer to recipes of ours.

Imports nothing of the converters before one is asked for.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from runtime.path_kinds import missing

if TYPE_CHECKING:
    from convert.recipes import CommandCheck

TOOLS = ("kohya", "onetrainer", "simpletuner")


def convert(
    tool: str, config: Path, datasets: Path | None, out: Path, check: "CommandCheck"
) -> list[str]:
    """Write the recipes of a config, and return what is to be printed.

    ``check`` refuses a command whose options are wrong, without running it.

    Raises:
        ValueError: the config cannot be read or converted, or OUT would be overwritten; names the
            file and the option.
        OSError: a file cannot be read or written.
    """
    from convert.kohya import convert_kohya
    from convert.onetrainer import convert_onetrainer
    from convert.recipes import check_replaceable, write_conversion
    from convert.simpletuner import convert_simpletuner

    for path in filter(None, (config, datasets)):
        if not path.exists():
            raise ValueError(missing(path))
    check_replaceable(out)
    if tool == "onetrainer":
        if datasets is not None:
            raise ValueError(f"{datasets}: OneTrainer's config names its concepts itself")
        conversion = convert_onetrainer(config, out)
    else:
        converter = {"kohya": convert_kohya, "simpletuner": convert_simpletuner}[tool]
        conversion = converter(config, datasets, out)
    lines = write_conversion(conversion, check)
    return [*lines, "", f"{out}: the recipes; its README.txt has all of this"]

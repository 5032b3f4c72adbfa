#!/usr/bin/env python
"""The command line. Each stage is imported inside its command, so that ``--help`` is quick."""

from functools import partial
from pathlib import Path
from typing import Any

import click

from cli_convert import TOOLS
from cli_group import commands, launched, make_settings, prepare_process, stage
from cli_pages import (
    GRID_PAGE,
    CheckpointPages,
    check_pages,
    report_at_end,
    show_grid,
    write_run_page,
)
from runtime.errors import echo, handle_errors
from runtime.messages import pluralize
from runtime.options import RECIPE_OPTION, FilePath, PathText, StageCommand
from runtime.path_kinds import check_cache, check_page, missing
from runtime.signals import Stopped
from runtime.workers import is_main_process

__all__ = ["commands"]


@stage("tune", "cli_tune:TuneSettings")
def tune(ctx: click.Context, debug: bool, **values: Any) -> None:
    """Fine-tune on a folder of images: encode, train, generate.

    Settings are chosen by the number of images, the base and the device. The three commands that
    it runs are printed first; what stands after -- is added to train. The same command goes on
    after an interruption.
    """
    with handle_errors(debug):
        settings = make_settings(ctx, values)
        from cli_tune import check_command, run_as_process
        from cli_tune import tune as run

        run(settings, run_as_process, partial(check_command, commands))


@stage("encode", "precompute.settings:EncodeSettings")
@RECIPE_OPTION
def encode(ctx: click.Context, debug: bool, recipe: Path | None, **values: Any) -> None:
    """Encode a folder of captioned images into a cache of shards.

    DATASET holds x.jpg beside x.txt or x.caption, in folders or in webdataset tars; a
    captions.jsonl or metadata.jsonl (file_name, text, weight, repeats, mask); or parquet or arrow.
    A dataset of the Hugging Face Hub is named hf://OWNER/NAME. The mask of an image
    lies beside it as x.mask.png or x-masklabel.png. With train/ and val/ in DATASET, each becomes a
    cache of its own. The same command continues an interrupted encode, and updates a finished
    cache.
    """
    with handle_errors(debug):
        settings = make_settings(ctx, values, recipe)
        if settings.dry_run:
            from precompute.plan.dry_run import dry_run

            for line in dry_run(settings):
                echo(line)
            return
        if launched(settings):
            return
        from precompute.encode import encode as run
        from precompute.report import describe, warn_of_rejected

        reports = run(settings)
        for report in reports:
            for line in describe(report, settings):
                echo(line)
            if warning := warn_of_rejected(report):
                echo(warning, err=True)
        for report in reports:
            if report.rejected_share > settings.max_rejected:
                raise click.ClickException(
                    f"{report.folder}: {report.rejected_share:.0%} of the images were rejected "
                    f"(--max-rejected {settings.max_rejected})"
                )
        if reports:
            echo(
                f"next: python cli.py train {settings.out} --base {settings.base} --out RUN "
                "--epochs 10"
            )


@commands.command()
@click.argument("cache", type=FilePath())
@click.argument("file", type=FilePath())
@click.option(
    "--base", type=PathText(), required=True, help="The SDXL base that CACHE was encoded with."
)
@click.option(
    "--tokenizers",
    type=FilePath(),
    help="Tokenizers as for encode; needed with a single file if the hub's cache has none.",
)
@click.option(
    "--device", default="auto", show_default=True, help="Device: auto, cuda, cuda:N, mps or cpu."
)
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def prompts(
    cache: Path, file: Path, base: str, tokenizers: Path | None, device: str, debug: bool
) -> None:
    """Replace the preview prompts of CACHE by those of FILE.

    FILE has the syntax of generate --prompts. The dataset is not needed.
    """
    with handle_errors(debug):
        check_cache(cache)
        from sdxl.base import check_base

        check_base(base)
        if not file.exists():
            raise ValueError(missing(file))
        prepare_process()
        from precompute.prompts import change_prompts

        path, count = change_prompts(cache, file, base, device, tokenizers)
        echo(f"{path}: {count} preview prompts")


@stage("train", "train.config:TrainConfig")
@RECIPE_OPTION
def train(ctx: click.Context, debug: bool, recipe: Path | None, **values: Any) -> None:
    """Fine-tune a LoRA, or the whole UNet, from the shards in CACHES.

    CACHE,weight=0.5 halves the loss of that cache's samples; CACHE,repeats=3 takes each of them
    three times per epoch. Prior images and other resolutions are caches of their own.
    """
    with handle_errors(debug):
        config = make_settings(ctx, values, recipe)
        if config.overwrite and recipe is not None:
            from train.run_folder import check_input

            check_input(recipe, config.out)
        if config.dry_run:
            from train.report import dry_run

            for line in dry_run(config):
                echo(line)
            return
        if launched(config):
            return
        from train.loop import train as run

        try:
            with CheckpointPages(config.out) as write_page:
                path = run(config, write_page)
        except (Stopped, FloatingPointError):  # it has come some way, which is worth a look
            report_at_end(config.out, _train_command())
            raise
        report_at_end(config.out, _train_command())
        if is_main_process():
            from train.report import describe_result

            for line in describe_result(config, path):
                echo(line)


def _train_command() -> StageCommand:
    """Whose settings a run's folder holds."""
    command = commands.commands["train"]
    assert isinstance(command, StageCommand)
    return command


@stage("generate", "infer.settings:GenerateSettings")
@RECIPE_OPTION
def generate(ctx: click.Context, debug: bool, recipe: Path | None, **values: Any) -> None:
    """Generate images from prompts.

    With a LoRA, with a fine-tuned UNet, or with the base alone.
    """
    with handle_errors(debug):
        settings = make_settings(ctx, values, recipe)
        if settings.grid:
            check_page(settings.out / GRID_PAGE)
        if launched(settings):
            return
        if settings.grid:
            from infer.grid import generate_grid

            if grid := generate_grid(settings):
                show_grid(settings.out, grid)
            return
        from infer.generate import generate as run

        report = run(settings)
        if report is not None:
            rate = (
                f" ({report.num_generated / report.seconds:.3g} images/s)"
                if report.num_generated
                else ""
            )
            drawn = pluralize(report.num_generated, "image")
            echo(
                f"{drawn} drawn{rate}, {report.num_kept} kept, in {settings.out}; all at a glance: "
                f"{report.sheet}"
            )


@stage("export", "infer.export_settings:ExportSettings")
def export(ctx: click.Context, debug: bool, **values: Any) -> None:
    """Convert WEIGHTS to a format that other tools read.

    A LoRA (a file, or a run, checkpoint or peft folder) becomes a kohya file, and a kohya file
    becomes a diffusers file. The UNet of train --full, or with --merge a LoRA in its base, becomes
    a single file in the original layout, with the base's VAE and text encoders. What was written is
    read back and compared.
    """
    with handle_errors(debug):
        settings = make_settings(ctx, values)
        from infer.export import export as run

        done = run(settings)
        echo(f"{done.path}: {done.description}, {done.num_bytes / 1e6:.1f} MB; read back and equal")


@stage("push", "infer.export_settings:PushSettings")
def push(ctx: click.Context, debug: bool, **values: Any) -> None:
    """Send WEIGHTS with a model card to the Hugging Face Hub.

    WEIGHTS is a run, or a LoRA or UNet of one; REPOSITORY is OWNER/NAME. A LoRA goes there for
    diffusers and for user interfaces. The card has the run's settings and previews, and how to use
    the weights; no path.
    """
    with handle_errors(debug):
        settings = make_settings(ctx, values)
        from cli_push import push as run

        for line in run(settings, _train_command()):
            echo(line)


@commands.command()
@click.argument("hub_id", metavar="ID")
@click.option("--out", type=FilePath(), required=True, help="Folder of the base.")
@click.option("--fp16", is_flag=True, help="Download the fp16 weights if the repository has both.")
@click.option("--file", help="The file to download from a repository of single-file bases.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def download(hub_id: str, out: Path, fp16: bool, file: str | None, debug: bool) -> None:
    """Download an SDXL base from the Hugging Face Hub into a folder.

    ID is OWNER/NAME, or OWNER/NAME@REVISION. Configs, tokenizers and safetensors files are
    downloaded, nothing else. The same command continues an interrupted download.
    """
    with handle_errors(debug):
        from sdxl.hub import download_base

        base = download_base(hub_id, out, fp16=fp16, file=file)
        echo(f"{base}\nnext: python cli.py encode DATASET --base {base} --out CACHE")


@commands.command()
@click.option(
    "--out",
    type=FilePath(file_okay=False),
    default=Path("demo-output"),
    show_default=True,
    help="Folder for the caches, the run and the images.",
)
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def demo(out: Path, debug: bool) -> None:
    """Fine-tune a miniature SDXL on a CPU in two to three minutes.

    It learns two new shapes; images before and after show it.
    """
    with handle_errors(debug):
        prepare_process()
        from tools.miniature.demo import run_demo

        run_demo(out, lambda arguments: commands.main(arguments, standalone_mode=False))


@commands.command()
@click.option(
    "--folder",
    type=FilePath(),
    default=Path(),
    help="Folder where caches and runs are to lie. Default: the current folder.",
)
@click.option("--base", type=PathText(), help="An SDXL base to look at too.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def doctor(folder: Path, base: str | None, debug: bool) -> None:
    """Check this machine: packages, device, memory, disk, hub.

    Each line says what was found and, where something lacks, what to do. The exit code is 1 if
    something fails that is needed.
    """
    with handle_errors(debug):
        from cli_doctor import examine, show

        if not all([show(finding) for finding in examine(folder, base)]):
            raise SystemExit(1)


@commands.command()
@click.argument("tool", type=click.Choice(TOOLS))
@click.argument("config", type=FilePath())
@click.argument("datasets", type=FilePath(), required=False)
@click.option("--out", type=FilePath(), required=True, help="Folder for the recipes.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def convert(tool: str, config: Path, datasets: Path | None, out: Path, debug: bool) -> None:
    """Convert the CONFIG of another trainer into recipes.

    CONFIG is a .toml of kohya, whose DATASETS are its dataset config; a .json of OneTrainer; or the
    config.json of SimpleTuner, whose DATASETS are its multidatabackend.json. What becomes of each
    option is printed, and written beside the recipes with the commands to type.
    """
    with handle_errors(debug):
        from cli_convert import convert as run
        from cli_tune import check_command

        for line in run(tool, config, datasets, out, partial(check_command, commands)):
            echo(line)


@commands.command()
@click.argument("cache", type=FilePath())
@click.option("--out", type=FilePath(), required=True, help="Folder for the images and captions.")
@click.option(
    "--vae",
    type=PathText(),
    help="Decode with this VAE: its folder or file, or a base that contains it. Without it the "
    "previews are a color for each latent pixel.",
)
@click.option(
    "--device", default="auto", show_default=True, help="Device: auto, cuda, cuda:N, mps or cpu."
)
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def unpack(cache: Path, out: Path, vae: str | None, device: str, debug: bool) -> None:
    """Turn CACHE back into a folder of previews with their captions.

    Each image is written under its path in the dataset, with its captions and mask beside it, as
    encode reads them; unpacked.jsonl has sizes, crops and weights. The same command continues an
    interrupted unpack.
    """
    with handle_errors(debug):
        check_cache(cache)
        from cli_caches import caches_in, unpack_cache

        for folder in caches_in(cache):
            unpack_cache(folder, out / folder.name if folder != cache else out, vae, device)


@commands.command()
@click.argument("cache", type=FilePath())
@click.option(
    "--repair", is_flag=True, help="Drop damaged samples, so that encode makes them again."
)
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def verify(cache: Path, repair: bool, debug: bool) -> None:
    """Check every byte of CACHE against its hashes.

    Names each damaged file and sample; the exit code is 1 if there is any.
    """
    with handle_errors(debug):
        check_cache(cache)
        from cli_caches import caches_in, verify_cache

        if not all([verify_cache(folder, repair) for folder in caches_in(cache)]):
            raise SystemExit(1)


@commands.command()
@click.argument("cache", type=FilePath())
@click.option(
    "--sheets",
    type=FilePath(file_okay=False),
    help="Write contact sheets of each bucket, with the crops, into this folder.",
)
@click.option(
    "--html",
    type=FilePath(),
    help="Write a page with every sample; of train and val one each, PAGE-train and PAGE-val.",
    metavar="PAGE",
)
@click.option(
    "--base",
    type=PathText(),
    help="With --html: the base that CACHE was encoded with, to count the tokens of captions.",
)
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def inspect(
    cache: Path, sheets: Path | None, html: Path | None, base: str | None, debug: bool
) -> None:
    """Describe CACHE: buckets, captions, statistics, rejected images."""
    with handle_errors(debug):
        if base is not None and html is None:
            raise ValueError("--base counts tokens for the page; give --html PAGE too")
        if html is not None:
            check_pages()
        check_cache(cache)
        from cli_caches import caches_in, inspect_cache, num_common

        parts, images = caches_in(cache), []
        for folder in parts:
            inside = folder.name if len(parts) > 1 else ""
            page = html and (html.with_stem(f"{html.stem}-{inside}") if inside else html)
            images.append(inspect_cache(folder, sheets and sheets / inside, page, base))
        if len(parts) == 2 and (num := num_common(*images)):
            echo(f"{pluralize(num, 'image')} of train equal one of val byte for byte")


@commands.command()
@click.argument("run", type=FilePath())
@click.option(
    "--out", type=FilePath(), help="File of the page. Default: report.html in the run's folder."
)
@click.option(
    "--val",
    type=FilePath(),
    help="The run's validation cache, to show samples of high loss. Default: where it was.",
    metavar="CACHE",
)
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def report(run: Path, out: Path | None, val: Path | None, debug: bool) -> None:
    """Write a page about RUN: curves, previews, samples, checkpoints.

    RUN is the folder that train's --out named; the run may be finished, stopped or still running.
    The page is one HTML file that needs no network. train writes it by itself at its end.
    """
    with handle_errors(debug):
        check_pages()
        echo(f"{write_run_page(run, out, _train_command(), val)}: open it in a browser")


@commands.command()
@click.argument("runs", type=FilePath(), nargs=-1, required=True)
@click.option("--out", type=FilePath(), required=True, help="File of the page.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def compare(runs: tuple[Path, ...], out: Path, debug: bool) -> None:
    """Write a page that compares RUNS.

    Their curves lie over each other; tables have the best checkpoint of each, and the settings that
    differ.
    """
    with handle_errors(debug):
        check_pages()
        from pages.compare import write_comparison

        echo(f"{write_comparison(runs, out, _train_command())}: open it in a browser")


if __name__ == "__main__":
    commands()

"""Looking into encoders and runs: probes, comparisons, experiments, pages."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeVar

import typer

from picture3d.cli.shell import DataOption, Device, Threads, show

_PANEL = "Comparisons and reports"  # of `picture3d --help`
app = typer.Typer()
experiment_app = typer.Typer(no_args_is_help=True, help="Compare ways of pre-training, cell by cell, over seeds.")
app.add_typer(experiment_app, name="experiment", rich_help_panel=_PANEL)
_Number = TypeVar("_Number", int, float)


@app.command(rich_help_panel=_PANEL)
def probe(
    run: Annotated[Path, typer.Argument(help="Run folder of a pre-training or fine-tuning.")],
    data: DataOption = None,
    label_share: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of the labelled scenes to train on.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampled voxels.")] = 0,
    split: Annotated[str, typer.Option("--split", help="Scored split.")] = "val",
    knn: Annotated[int, typer.Option("--knn", min=0, help="Nearest labelled voxels that vote; 0 leaves them out.")] = 20,
    teacher: Annotated[
        bool, typer.Option("--teacher", help="Look at the teacher of a pre-training instead of its encoder.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """Read a frozen encoder's features out: linear classifier, nearest neighbours, effective rank; class by class."""
    from picture3d.commands.probe import probe as command

    told = command(
        run,
        data=data,
        label_share=label_share,
        seed=seed,
        as_json=as_json,
        device=device,
        threads=threads,
        split=split,
        neighbours=knn,
        teacher=teacher,
    )
    show(told)


@app.command(rich_help_panel=_PANEL)
def compare(
    first: Annotated[Path, typer.Argument(help="Run folder or checkpoint of a pre-training or fine-tuning.")],
    others: Annotated[list[Path], typer.Argument(help="One or several more; each is compared with the first.")],
    data: DataOption = None,
    split: Annotated[str | None, typer.Option("--split", help="Default: val if there is one.")] = None,
    frames: Annotated[int, typer.Option("--frames", min=1, help="Sweeps they look at, evenly spread.")] = 4,
    out: Annotated[Path | None, typer.Option("--out", help="Leave JSON and heat maps here; `report` shows them.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """Compare encoders layer by layer: linear CKA of all layers, disparity of the weights."""
    from picture3d.commands.compare import compare as command

    told = command(
        first, others, data=data, split=split, frames=frames, out=out, as_json=as_json, device=device, threads=threads
    )
    show(told)


@experiment_app.command("label-efficiency")
def experiment_label_efficiency(
    out: Annotated[Path, typer.Option("--out", help="Folder of the experiment; what is finished there is not done again.")],
    data: Annotated[Path, typer.Option("--data", help="Folder of prepared frames, with stored targets for their recipes.")],
    methods: Annotated[
        str, typer.Option(help="scratch, or names of pre-training recipes, by comma; gains are over the first.")
    ] = "scratch,town-coordinates,town-picture,town-picture-visible",
    shares: Annotated[str, typer.Option(help="Shares of the labelled scenes, by comma.")] = "0.0625,0.25,1",
    seeds: Annotated[str, typer.Option(help="Seeds, by comma.")] = "0,1,2",
    recipe: Annotated[
        str, typer.Option("--recipe", help="Fine-tuning of all cells: a recipe of any task.")
    ] = "town-segmentation",
    pretrain_set: Annotated[
        list[str] | None, typer.Option("--pretrain-set", metavar="KEY=VALUE", help="Change every pre-training. Repeatable.")
    ] = None,
    finetune_set: Annotated[
        list[str] | None, typer.Option("--finetune-set", metavar="KEY=VALUE", help="Change every fine-tuning. Repeatable.")
    ] = None,
    split: Annotated[str, typer.Option("--split", help="Scored split.")] = "val",
    probe_share: Annotated[
        float | None, typer.Option("--probe", help="Also probe each frozen encoder on this share of the labelled scenes.")
    ] = None,
    encoders: Annotated[
        int | None,
        typer.Option(help="Pre-train so many per method; seed s begins from number s modulo this. Default: one per seed."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """Fine-tune from several encoders at several shares of the labels; table with mean, spread and confidence interval."""
    from picture3d.commands.experiment import Plan, label_efficiency_experiment

    plan = Plan(
        data=data,
        methods=tuple(methods.split(",")),
        shares=tuple(_numbers(shares, float, "--shares")),
        seeds=tuple(_numbers(seeds, int, "--seeds")),
        finetuning=recipe,
        pretrain_set=tuple(pretrain_set or ()),
        finetune_set=tuple(finetune_set or ()),
        split=split,
        probe_share=probe_share,
        encoders=encoders,
    )
    show(label_efficiency_experiment(plan, out, device=device, threads=threads, as_json=as_json))


@app.command(rich_help_panel=_PANEL)
def report(
    folder: Annotated[Path, typer.Argument(help="Folder that holds run folders (as `demo` leaves it), or an experiment.")],
    data: DataOption = None,
    out: Annotated[Path | None, typer.Option("--out", help="The page; default FOLDER/report.html.")] = None,
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """Write one self-contained page: what was run, curves, scores and pictures."""
    from picture3d.commands.report import report as command

    show(command(folder, data=data, out=out, device=device, threads=threads))


@app.command(rich_help_panel=_PANEL)
def tensorboard(
    run: Annotated[Path, typer.Argument(help="Run folder of a training.")],
    out: Annotated[Path | None, typer.Option("--out", help="Event folder; default RUN/tensorboard.")] = None,
) -> None:
    """Replay a run's metrics into TensorBoard event files (extra: track)."""
    from picture3d.commands.train import tensorboard as command

    show(command(run, out))


def _numbers(text: str, kind: type[_Number], option: str) -> list[_Number]:
    """Comma-separated numbers of an option."""
    try:
        return [kind(word) for word in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"expected numbers by comma, got '{text}'", param_hint=option) from None

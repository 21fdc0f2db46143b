# SPDX-License-Identifier: Apache-2.0
"""The `vtprune` command. Commands import what they need themselves, so that `--help` does not wait for torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vtprune.cli_errors import plain_errors
from vtprune.demo.command import demo
from vtprune.errors import ConfigError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from vtprune import __version__

        typer.echo(f"vtprune {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Prune visual tokens of Hugging Face vision-language models, and measure what it costs and saves."""


@app.command("eval")
@plain_errors
def evaluate(
    config: Annotated[
        Path,
        typer.Argument(help="YAML file: a model, a task, methods and budgets. Or 'quickstart', 'video' or 'clip'."),
    ],
    output: Annotated[Path | None, typer.Option(help="Folder of the results, instead of the file's.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Number of examples, instead of the file's.")] = None,
    change: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="E.g. methods.0.layer=3; repeatable.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list the cells and what they would cost.")] = False,
    shard: Annotated[
        str | None, typer.Option(metavar="I/N", help="Run a share of the batches: 3/8 is every 8th from the 3rd on.")
    ] = None,
) -> None:
    """Run a grid of methods and budgets; started again, it goes on where it was stopped."""
    from vtprune.eval.config import load_config, parse_changes
    from vtprune.eval.results.entries import studies
    from vtprune.eval.results.terminal import terminal_table
    from vtprune.eval.results.timings import latencies
    from vtprune.eval.running.estimate import estimate_tables
    from vtprune.eval.running.runner import run
    from vtprune.eval.running.shards import Shard

    settings = load_config(config, parse_changes(change or []), output=output, limit=limit)
    share = None if shard is None else Shard.parse(shard)
    console = Console()
    if dry_run:
        for table in estimate_tables(settings):
            console.print(table)
        return
    results = run(settings, Console(stderr=True), share)
    if not results:  # another process, or a later run, has them
        return
    times = latencies([settings.output])
    for study in studies(results).values():
        console.print(terminal_table(study, times))
    console.print(f"results.jsonl, summary.md and the plots are in {settings.output}", highlight=False)


@app.command()
@plain_errors
def tune(
    model: Annotated[str, typer.Option(help="Folder or hub id of a model, or one that comes with the library.")],
    task: Annotated[str, typer.Option(help="Name of a task, lmms:NAME, or a .jsonl or .csv file with own data.")],
    include_path: Annotated[Path | None, typer.Option(help="Folder with further tasks of lmms-eval.")] = None,
    retain: Annotated[float | None, typer.Option(help="Goal: least share of the full model's score, 0.98.")] = None,
    flops: Annotated[float | None, typer.Option(help="Goal: largest share of the prefill's FLOPs.")] = None,
    latency: Annotated[str | None, typer.Option(help="Goal: largest share of the time, or seconds: 0.8s.")] = None,
    kv: Annotated[float | None, typer.Option(help="Goal: largest share of the KV cache.")] = None,
    minutes: Annotated[float | None, typer.Option("--time", help="Minutes it may take; default no limit.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder; default results/tune-TASK.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Number of examples; default all.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Prompts at a time; default 16.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    attention: Annotated[str | None, typer.Option(help="Attention back end: sdpa, eager, ...")] = None,
) -> None:
    """Choose a method and a budget for a model and a task; exit code 1 if none meets the goal (docs/tune.md)."""
    from vtprune.eval.tuning.config import Goal, TuneConfig, task_entry
    from vtprune.eval.tuning.output import TUNED, show
    from vtprune.eval.tuning.run import tune as run_tune

    goal = Goal.of(retain=retain, flops=flops, latency=latency, kv=kv)
    config = TuneConfig.of(
        goal,
        model=model,
        task=task_entry(task),
        include_path=include_path,
        output=output or Path(f"results/tune-{Path(task.removeprefix('lmms:')).stem}"),
        minutes=minutes,
        limit=limit,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
        attention=attention,
    )
    outcome = run_tune(config, Console(stderr=True))
    show(outcome, Console())
    if outcome.found.choice is None:
        raise typer.Exit(1)
    typer.echo(f"vtprune.prune(model, {str(config.evaluation.output / TUNED)!r}) runs this setting")


@app.command()
@plain_errors
def schema() -> None:
    """Print the JSON schema of evaluation files, for editors."""
    import json

    from vtprune.eval.config_schema import json_schema

    typer.echo(json.dumps(json_schema(), indent=2))


@app.command()
@plain_errors
def bench(
    config: Annotated[Path | None, typer.Argument(help="YAML file, or 'bench'; options replace its fields.")] = None,
    shape: Annotated[str | None, typer.Option(help="A published model's shape, with random weights.")] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Decoder layers of the shape; default all.")] = None,
    model: Annotated[str | None, typer.Option(help="Folder or hub id of a model, instead of a shape.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...")] = None,
    attention: Annotated[str | None, typer.Option(help="Attention back end: sdpa, eager, flash_attention_2.")] = None,
    linear: Annotated[
        str | None, typer.Option(help="onednn or torch computes linear layers; default onednn for float32 on a CPU.")
    ] = None,
    cache: Annotated[str | None, typer.Option(help="KV cache: dynamic, the default, or static.")] = None,
    compile_steps: Annotated[
        bool | None, typer.Option("--compile", help="Compile decoding steps; needs --cache static.")
    ] = None,
    methods: Annotated[str | None, typer.Option(help="Names, separated by commas.")] = None,
    keep_ratio: Annotated[
        list[float] | None, typer.Option(help="Share of the visual tokens to keep; repeatable.")
    ] = None,
    batch_sizes: Annotated[str | None, typer.Option(help="Numbers, separated by commas.")] = None,
    output_tokens: Annotated[str | None, typer.Option(help="Lengths of answers, separated by commas.")] = None,
    repeats: Annotated[int | None, typer.Option(min=1, help="Rounds, in each of which every row runs once.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for bench.jsonl and bench.md.")] = None,
) -> None:
    """Measure time and memory of encoder, selection, prefill and decoding, beside what the FLOPs promise."""
    from vtprune.eval.bench.config import load_config
    from vtprune.eval.bench.run import run
    from vtprune.eval.bench.table import show

    def split(option: str | None) -> list[str] | None:
        return None if option is None else option.split(",")

    settings = load_config(
        config,
        shape=shape,
        layers=layers,
        model=model,
        dtype=dtype,
        device=device,
        attention=attention,
        linear=linear,
        cache=cache,
        compile=compile_steps,
        methods=split(methods),
        keep_ratios=keep_ratio or None,
        batch_sizes=split(batch_sizes),
        output_tokens=split(output_tokens),
        repeats=repeats,
        output=output,
    )
    lines = run(settings, Console(stderr=True))
    console = Console()
    show(lines, console)
    if settings.output is not None:
        console.print(f"bench.jsonl and bench.md are in {settings.output}", highlight=False)


@app.command()
@plain_errors
def doctor(
    model: Annotated[str | None, typer.Option(help="Folder or hub id of a checkpoint, instead of tiny models.")] = None,
    family: Annotated[str | None, typer.Option(help="One family, instead of all.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    attention: Annotated[str | None, typer.Option(help="Attention back end: eager, flash_attention_2, ...")] = None,
) -> None:
    """Check that pruning is right on this machine; exit code 1 if a promise fails (docs/doctor.md)."""
    from vtprune.doctor import Settings, run

    settings = Settings(device=device, dtype=dtype, attention=attention)
    if not run(Console(), settings, model=model, family=family):
        raise typer.Exit(1)


@app.command()
@plain_errors
def methods(
    model: Annotated[
        str | None, typer.Option(help="Folder or hub id of a model: say of each method whether it fits.")
    ] = None,
) -> None:
    """List the methods: where they act, what they look at, their source. Or which of them fit a model."""
    from vtprune.listings import all_methods, print_methods_of

    if model is None:
        Console().print(all_methods())
    else:
        print_methods_of(Console(), model)


@app.command()
@plain_errors
def models(
    every: Annotated[
        bool, typer.Option("--all", help="Every multimodal class of transformers, with the reason if it is refused.")
    ] = False,
) -> None:
    """List the supported model families: what they take, how they lay it out, which stages and signals methods get."""
    from vtprune.listings import print_families, print_models

    if every:
        print_models(Console())
    else:
        print_families(Console())


@app.command()
@plain_errors
def run(
    model: Annotated[str, typer.Option(help="Folder or hub id of a model, or 'digitscenes'.")],
    method: Annotated[str, typer.Option(help="Name of a method, or a YAML file with one.")],
    image: Annotated[Path, typer.Option(help="Image file.")],
    prompt: Annotated[str, typer.Option(help="Question about the image.")],
    keep_ratio: Annotated[float | None, typer.Option(help="Share of the visual tokens to keep, in (0, 1].")] = None,
    keep_tokens: Annotated[int | None, typer.Option(min=0, help="Number of visual tokens to keep of a crop.")] = None,
    parameters: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A parameter of the method: layer=3. Repeats."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto: all accelerators, else cpu.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto: that of the weights.")] = "auto",
    show: Annotated[Path | None, typer.Option(help="Write a picture here, of what was kept.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 64,
) -> None:
    """Answer one question about one image with pruning, and report what went."""
    import torch

    import vtprune
    from vtprune.eval.config import parse_changes
    from vtprune.eval.inputs import chat_inputs, check_device, load_model
    from vtprune.eval.pages.kept import HEIGHTS, draw_kept
    from vtprune.eval.pages.views import view_of
    from vtprune.eval.running.devices import place_of
    from vtprune.methods import build_methods
    from vtprune.show import check_target, load_picture

    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ConfigError(f"--dtype {dtype}: expected auto, float32, bfloat16 or float16")
    budget = {"keep_ratio": keep_ratio, "keep_tokens": keep_tokens}
    given = {key: value for key, value in budget.items() if value is not None} | parse_changes(parameters or [])
    chosen = build_methods(method, **given)  # before the model is loaded: a misspelt name should not wait for it
    picture = load_picture(image)
    if show is not None:
        check_target(show)
    if device != "auto":
        check_device(device)
    typer.echo(f"loading {model}", err=True)
    vlm, processor = load_model(model, dtype=dtype, device=device)
    inputs = chat_inputs(processor, [picture], [prompt]).to(vlm.device, vlm.dtype)
    session = vtprune.prune(vlm, chosen)
    typer.echo(f"{type(vlm).__name__} on {place_of(vlm)}, {str(vlm.dtype).removeprefix('torch.')}", err=True)
    seen = None if show is None else view_of(vlm, processor, inputs, prompt, "image", HEIGHTS)
    if show is not None and seen is None:
        family = vtprune.adapter_for(vlm).family
        raise ConfigError(f"--show: the places of the visual tokens of this {family} are not known; leave it out")
    with session:
        output = vlm.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        report = session.report
    answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    typer.echo(answer.strip())
    typer.echo(str(report))
    if seen is not None:
        kept = torch.searchsorted(report.visual[0], report.kept(0)).tolist()
        draw_kept(*seen, kept).save(show)
        typer.echo(f"kept tokens of the last layer: {show}")


@app.command()
@plain_errors
def report(
    folders: Annotated[list[Path], typer.Argument(help="Folders that `vtprune eval` or `vtprune bench` wrote.")],
    output: Annotated[Path | None, typer.Option(help="The file; default report.html in the first folder.")] = None,
) -> None:
    """Write one HTML file with tables, plots, pictures of what was kept, disagreements and provenance."""
    from vtprune.eval.pages.report import write_report

    path = output or folders[0] / "report.html"
    for text in write_report(folders, path):
        typer.echo(f"unfinished: {text}", err=True)
    typer.echo(path)


@app.command()
@plain_errors
def compare(
    first: Annotated[Path, typer.Argument(help="Folder of results.")],
    second: Annotated[Path, typer.Argument(help="Folder of results of the same task.")],
) -> None:
    """Compare two runs example by example; exit code 1 if the second is significantly worse in any row."""
    from vtprune.eval.results.compare import compare as paired
    from vtprune.eval.results.compare import terminal_tables

    compared = paired(first, second)
    for text in compared.shared:
        typer.echo(text)
    for table in terminal_tables(compared):
        Console().print(table)
    for folder, names in zip((first, second), compared.only, strict=True):
        if names:
            typer.echo(f"only in {folder}: {', '.join(names)}")
    if compared.worse:
        raise typer.Exit(1)


app.command()(plain_errors(demo))

"""What several commands of the terminal share: options, how errors of users are told, arguments of generate()."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from safetensors import SafetensorError

TargetOption = Annotated[
    str | None,
    typer.Option(help="Hub id, folder or .gguf file; SmolLM2-135M-Instruct if absent.", show_default=False),
]
DraftOption = Annotated[
    str | None,
    typer.Option(help="Folder or Hub id; the draft that the repository ships if absent.", show_default=False),
]
PackedOption = Annotated[
    bool, typer.Option("--packed/--no-packed", help="Pack weights for the CPU first (prepare_for_cpu), for both ways.")
]
JsonOption = Annotated[Path | None, typer.Option("--json", help="File to write settings and figures to.")]
TemperatureOption = Annotated[float, typer.Option(min=0.0, help="0 is greedy decoding.")]
TopPOption = Annotated[float | None, typer.Option(help="Nucleus; with a temperature.")]
RepetitionPenaltyOption = Annotated[float | None, typer.Option(help="1 is none.")]


@contextmanager
def user_errors() -> Iterator[None]:
    """Print what a user can put right as one line, and end with status 1."""
    try:
        yield
    except (ValueError, OSError, ImportError, SafetensorError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error


def sampling_settings(
    max_new_tokens: int, temperature: float, top_p: float | None, repetition_penalty: float | None
) -> dict:
    """Arguments of generate(): greedy at temperature 0, else sampling."""
    settings: dict = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
    if temperature > 0:
        settings["temperature"] = temperature
        if top_p is not None:
            settings["top_p"] = top_p
    if repetition_penalty is not None:
        settings["repetition_penalty"] = repetition_penalty
    return settings


def report_file(path: Path | None) -> None:
    """Say that a file was written, if it was asked for."""
    if path is not None:
        typer.echo(f"wrote {path}")


def add_moved(app: typer.Typer, name: str, command: str) -> None:
    """A command of the last release that is gone: it says what took its place, and ends with status 2."""

    @app.command(
        name, hidden=True, add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True}
    )
    def moved():
        place = ", in a clone of the repository" if command.startswith("python") else ""
        typer.echo(f"error: `{name}` has moved: use `{command}`{place}", err=True)
        raise typer.Exit(2)

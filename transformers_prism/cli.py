"""The `transformers-prism` command. Each command imports what it needs when it runs, so that `--help` is quick."""

from typing import Annotated, Literal

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def main():
    """Lossless speculative decoding for transformers with PRISM drafts."""


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="Folder with config.json and the weights.")],
    destination: Annotated[str, typer.Argument(help="Folder to write; must be empty or not there.")],
    form: Annotated[Literal["prism-artifact"], typer.Option("--from", help="Form of the source.")],
    target: Annotated[str | None, typer.Option(help="The target: folder or name on the Hub.")] = None,
    context_kv: Annotated[
        Literal["prefill_module", "own_module"],
        typer.Option(help="Whose keys and values later steps see: as the authors decode, or as they train."),
    ] = "prefill_module",
    num_target_layers: Annotated[
        int | None, typer.Option(help="Decoder layers of the target, where --target is not given.")
    ] = None,
):
    """Convert a draft that others trained."""
    from transformers_prism.conversion.prism_artifact import convert as convert_prism_artifact

    try:
        report = convert_prism_artifact(source, destination, target, context_kv, num_target_layers)
    except ValueError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    typer.echo(str(report))


if __name__ == "__main__":
    app()

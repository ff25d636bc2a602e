"""The `transformers-prism` command. Each command imports what it needs when it runs."""

from typing import Annotated

import typer

from transformers_prism.cli import convert, decode, hub, serve, train
from transformers_prism.cli.bench import bench_app
from transformers_prism.cli.options import Commands, add_moved

app = Commands()


def _show_version(is_asked: bool) -> None:
    if is_asked:
        from transformers_prism import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the package's version.")
    ] = False,
):
    """Lossless speculative decoding for transformers with PRISM drafts."""


for _add_commands in (decode.add_to, serve.add_to, train.add_to, hub.add_to, convert.add_to):
    _add_commands(app)
app.add_typer(bench_app, name="bench")
add_moved(app, "study", "python -m benchmarks.study")


if __name__ == "__main__":
    app()

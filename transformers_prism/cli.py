"""The `transformers-prism` command. Each command imports what it needs when it runs, so that `--help` is quick."""

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def main():
    """Lossless speculative decoding for transformers with PRISM drafts."""


if __name__ == "__main__":
    app()

"""The command `convert`: drafts of other packages, read and written."""

from typing import Annotated, Literal

import typer

from transformers_prism.cli.options import ADVANCED, Commands


def add_to(app: Commands) -> None:
    """Add the command to the command line."""
    app.command("convert")(convert)


def convert(
    source: Annotated[
        str, typer.Argument(help="Folder or Hub id: a draft from another package with --from, a PRISM draft with --to.")
    ],
    destination: Annotated[str, typer.Argument(help="Folder to write; must be empty or not exist.")],
    from_form: Annotated[
        Literal["prism-artifact", "sglang", "eagle", "eagle3", "speculators"] | None,
        typer.Option(
            "--from",
            help="Form of the source: the PRISM authors' PyTorch or SGLang code, EAGLE-1/2 or HASS, EAGLE-3, speculators.",
        ),
    ] = None,
    to_form: Annotated[
        Literal["sglang", "eagle", "eagle3", "speculators"] | None, typer.Option("--to", help="Form to write a PRISM draft in.")
    ] = None,
    target: Annotated[str | None, typer.Option(help="The target: folder or Hub id.")] = None,
    context_kv: Annotated[
        Literal["prefill_module", "own_module"],
        typer.Option(
            help="With --from: whose keys and values later steps see, as the authors decode, or as they train.",
            rich_help_panel=ADVANCED,
        ),
    ] = "prefill_module",
    num_target_layers: Annotated[
        int | None,
        typer.Option(help="With --from: decoder layers of the target, where --target is not given.", rich_help_panel=ADVANCED),
    ] = None,
):
    """Convert a draft from another package, or a PRISM draft for one; all but prism-artifact is experimental."""
    from transformers_prism.conversion.forms import READ, WRITTEN

    if from_form is not None and to_form is None:
        report = READ[from_form].convert(source, destination, target, context_kv, num_target_layers)
    elif to_form is not None and from_form is None:
        if context_kv != "prefill_module" or num_target_layers is not None:
            name = "num_target_layers" if num_target_layers is not None else "context_kv"
            raise ValueError(f"{name}: expected none with --to, which takes it from the draft, got one")
        report = WRITTEN[to_form].export(source, destination, target)
    else:
        raise ValueError(f"expected either --from or --to, got {'none' if from_form is None else 'both'}")
    typer.echo(str(report))

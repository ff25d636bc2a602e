"""The commands around a draft's repository: `inspect`, `push` and `card`."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from transformers_prism.cli.options import ADVANCED, Commands

BaseModelOption = Annotated[
    str | None, typer.Option(help="The target's name on the Hub, user/name, for the card.", show_default=False)
]


def add_to(app: Commands) -> None:
    """Add the commands to the command line."""
    app.command("card")(card)
    app.command("inspect")(inspect)
    app.command("push")(push)


def card(
    folder: Annotated[Path, typer.Argument(help="The draft's folder.")],
    measurements: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Files of `bench generate`, `bench acceptance` and `verify` with --json, in the card's order; they replace those "
            "in metrics.json, which stays as it is if none is named.",
            show_default=False,
        ),
    ] = None,
    base_model: BaseModelOption = None,
):
    """Write a draft's card, README.md, from its measurements and training record."""
    from transformers_prism.hub.card import name_target, write_card

    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"expected the folder of a draft, with config.json in it, got {folder}")
    if base_model is not None:
        name_target(folder, base_model)
    for name in write_card(folder, measurements):
        typer.echo(f"wrote {folder / name}")


def inspect(
    draft: Annotated[str, typer.Argument(help="The draft's folder, or its name on the Hub.")],
    target: Annotated[
        str | None, typer.Option(help="A target on this machine; the one that the draft names if absent.", show_default=False)
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Of the repository on the Hub.", show_default=False, rich_help_panel=ADVANCED)
    ] = None,
    verify_bytes: Annotated[
        bool, typer.Option("--verify", help="Check every byte of a repository against the Hub's hashes, or a folder's weights against metrics.json.")
    ] = False,
):
    """Say what a draft is: target, modules, sizes, bytes read per draft step, whether the target here matches.

    Exits with 1 if the target here does not match, or with --verify if a byte differs.
    """
    from transformers_prism.hub.inspection import inspect_draft, verify_files

    inspection = inspect_draft(draft, target, revision)
    for name, text in inspection.rows():
        typer.echo(f"{name + ':':<36}{text}")
    if verify_bytes:
        typer.echo(f"{'verified:':<36}{verify_files(draft, revision)}")
    raise typer.Exit(1 if inspection.fatal else 0)


def push(
    folder: Annotated[str, typer.Argument(help="The draft's folder, or its name on the Hub; with --code-only user/name alone.")],
    repository: Annotated[
        str | None, typer.Argument(help="user/name on the Hub; created if missing.", show_default=False)
    ] = None,
    base_model: BaseModelOption = None,
    private: Annotated[bool, typer.Option("--private", help="Make the repository private if it is created.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would be pushed, with sizes, and push nothing.")] = False,
    revision: Annotated[
        str | None,
        typer.Option(help="Branch; created if missing, unless --code-only.", show_default=False, rich_help_panel=ADVANCED),
    ] = None,
    message: Annotated[
        str | None,
        typer.Option(
            help="Of the commit; 'Upload draft' or 'Renew code' if absent.", show_default=False, rich_help_panel=ADVANCED
        ),
    ] = None,
    code_only: Annotated[
        bool,
        typer.Option(
            "--code-only", help="Renew the code of a draft that is on the Hub; Python files at its root are taken for the code's, all else there stays.", rich_help_panel=ADVANCED
        ),
    ] = False,
):
    """Push a draft to the Hub: weights, code, card, metrics and licence, in one commit; or renew the code alone.

    Log in first with `hf auth login`, or set HF_TOKEN.
    """
    from huggingface_hub.utils import validate_repo_id

    if repository is not None:
        validate_repo_id(repository)
    if code_only:
        if repository is not None or private or dry_run or base_model:
            raise ValueError(
                "--code-only: expected the name of one draft on the Hub, got another name, --private, --dry-run or --base-model"
            )
        typer.echo(_renew_code(folder, revision, message or "Renew code"))
        return
    if repository is None:
        raise ValueError("expected a draft and the repository to push it to, user/name, got only the draft")
    if base_model is not None and not (Path(folder) / "config.json").is_file():
        raise ValueError(f"--base-model: expected the folder of a draft, whose card can be written, got {folder}")
    if dry_run:
        typer.echo(_files_to_push(folder, repository, private, revision, base_model))
    else:
        _name_target(folder, base_model)
        typer.echo(_push_draft(folder, repository, private, revision, message or "Upload draft"))


def _name_target(folder: str, base_model: str | None) -> None:
    """Write the target's name into the card of a draft in a folder, or warn if the card names none."""
    from transformers_prism.hub.card import name_target, names_target, write_card

    is_folder = (Path(folder) / "config.json").is_file()
    if base_model is not None:
        name_target(folder, base_model)
        write_card(folder)
    elif is_folder and not names_target(folder):
        warnings.warn("the card does not name the draft's target; --base-model user/name writes it", stacklevel=1)


def _files_to_push(folder: str, repository: str, private: bool, revision: str | None, base_model: str | None) -> str:
    """What a push would upload: it is written as for a push, but into a temporary folder."""
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        written = Path(scratch) / repository.split("/")[-1]
        _draft_to_push(folder).save_pretrained(written)
        _name_target(str(written), base_model)
        sizes = {path.relative_to(written).as_posix(): path.stat().st_size for path in written.rglob("*") if path.is_file()}
    lines = [f"{size:>12,}  {name}" for name, size in sorted(sizes.items())]
    place = f"{repository}, {'private if it is new' if private else 'public if it is new'}, branch {revision or 'main'}"
    total = f"{sum(sizes.values()):>12,}  bytes in {len(sizes)} files for {place}; nothing was pushed"
    return "\n".join([*lines, total])


def _draft_to_push(folder: str):
    from transformers_prism.modeling_prism import PrismDraftModel
    from transformers_prism.target import naming

    with naming("draft", folder):
        return PrismDraftModel.from_pretrained(folder)


def _push_draft(folder: str, repository: str, private: bool, revision: str | None, message: str) -> str:
    draft = _draft_to_push(folder)
    with _reachable_hub():
        commit = draft.push_to_hub(repository, private=private, revision=revision, commit_message=message)
    return f"pushed {repository}, revision {commit.oid}"


def _renew_code(repository: str, revision: str | None, message: str) -> str:
    from transformers_prism.hub.renewal import renew_code

    with _reachable_hub():
        commit, is_new = renew_code(repository, revision=revision, message=message)
    if is_new:
        return f"renewed the code of {repository}, revision {commit.oid}"
    return f"the code of {repository} is this package's already, revision {commit.oid}"


@contextmanager
def _reachable_hub() -> Iterator[None]:
    """Turn errors of the connection into one line that says that nothing was pushed.

    Raises:
        OSError: if the Hub cannot be reached.
    """
    try:
        yield
    except Exception as error:
        # The class comes from the HTTP client of huggingface_hub, which another release may replace.
        names = {kind.__name__ for kind in type(error).__mro__}
        if not names & {"TransportError", "OfflineModeIsEnabled"}:
            raise
        reason = " ".join(str(error).split())
        raise OSError(f"nothing was pushed, the Hub cannot be reached: {reason}; --dry-run lists the files offline") from error

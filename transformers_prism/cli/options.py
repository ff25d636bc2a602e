"""What the commands share: their class, options that several have, and how errors and warnings are shown."""

import logging
import traceback
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Literal

import typer
from safetensors import SafetensorError
from typer.core import TyperCommand, TyperOption

# Groups of options in the help; an option that names none is in the first.
BASIC, COST, ADVANCED = "Basic options", "Cost: time and memory", "Advanced options"
# What commands need beyond the package itself, by extra.
EXTRAS = {
    "train": ("accelerate", "datasets", "matplotlib", "pyarrow"),
    "gguf": ("gguf", "accelerate"),
    "triton": ("triton",),
    "serve": ("fastapi", "uvicorn", "openai"),
    "web": ("gradio",),
}
QUIET_VARIABLE = "TRANSFORMERS_PRISM_QUIET"
_BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}

TargetOption = Annotated[
    str | None,
    typer.Option(help="Hub id, folder or .gguf file of the target; SmolLM2-135M-Instruct if absent.", show_default=False),
]
DraftOption = Annotated[
    str | None,
    typer.Option(help="Folder or Hub id of the draft; the one that the repository ships if absent.", show_default=False),
]
DeviceOption = Annotated[
    str, typer.Option(help="Of both models: cpu, cuda, ...; auto is an accelerator if there is one.", rich_help_panel=COST)
]
DtypeOption = Annotated[
    Literal["float32", "bfloat16", "float16"],
    typer.Option(help="Of both models; in 16 bits rounding may decide near-ties, so that texts differ.", rich_help_panel=COST),
]
PackedOption = Annotated[
    bool,
    typer.Option(
        "--packed/--no-packed",
        help="Pack weights first, with and without the draft: on a CPU (prepare_for_cpu). --no-packed: use them as loaded.",
        rich_help_panel=COST,
    ),
]


def in_a_folder(path: Path | None) -> Path | None:
    """Refuse a file that could not be written, before the measurement that it is for begins."""
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise typer.BadParameter(f"expected a file in a folder that is there, got {path}")
    return path


JsonOption = Annotated[
    Path | None,
    typer.Option("--json", help="File to write settings and figures to.", callback=in_a_folder, rich_help_panel=ADVANCED),
]
TemperatureOption = Annotated[float, typer.Option(min=0.0, help="0 is greedy decoding.")]
TopPOption = Annotated[float | None, typer.Option(min=0.0, max=1.0, help="Nucleus sampling; with a temperature.", rich_help_panel=ADVANCED)]
RepetitionPenaltyOption = Annotated[float | None, typer.Option(help="1 is none.", rich_help_panel=ADVANCED)]
SeedOption = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of every random number.", rich_help_panel=ADVANCED)]
RunSeedOption = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed, set before every answer.", rich_help_panel=ADVANCED)]
AnswerTokensOption = Annotated[int, typer.Option(min=2, help="Tokens per answer.", rich_help_panel=COST)]


class Commands(typer.Typer):
    """A group of commands, each a [`Command`]."""

    def __init__(self, **settings):
        super().__init__(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, **settings)

    def command(self, name: str | None = None, **settings):
        """As `typer.Typer.command`."""
        return super().command(name, **{"cls": Command, **settings})


class Command(TyperCommand):
    """A command with `--traceback` and `--quiet`, which reports errors in one line.

    For one release it also accepts the spellings of earlier releases: `--batch_size`, and `--text-tokens False` for
    `--no-text-tokens`.
    """

    def __init__(self, *args, params=None, **settings):
        super().__init__(*args, params=[*(params or []), *_shared_options()], **settings)
        for param in self.params:
            if isinstance(param, TyperOption) and param.rich_help_panel is None:
                param.rich_help_panel = BASIC

    def get_help_option(self, ctx):
        """`--help`, with the advanced options."""
        option = super().get_help_option(ctx)
        if option is not None:
            option.rich_help_panel = ADVANCED
        return option

    def parse_args(self, ctx, args: list[str]) -> list[str]:
        """Parse the command line; `ctx.meta["words"]` keeps its words, with old spellings replaced."""
        words, notices = present_spelling(self.params, args)
        ctx.meta["words"] = list(words)  # the parser empties `words`
        rest = super().parse_args(ctx, words)
        with _shown(is_quiet=ctx.params.get("quiet", False)):
            if notices:
                warnings.warn(f"old spelling, which the next release will not know: {', '.join(notices)}", stacklevel=1)
        return rest

    def invoke(self, ctx):
        """Run the command."""
        has_traceback, is_quiet = ctx.params.pop("traceback"), ctx.params.pop("quiet")
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        with _shown(is_quiet), user_errors(has_traceback):
            return super().invoke(ctx)


def _shared_options() -> list:
    """The options that every command has."""
    app = typer.Typer(add_completion=False)

    @app.command()
    def shared(
        traceback: Annotated[
            bool, typer.Option("--traceback", help="Show where an error came from.", rich_help_panel=ADVANCED)
        ] = False,
        quiet: Annotated[
            bool, typer.Option("--quiet", envvar=QUIET_VARIABLE, help="Show no warnings.", rich_help_panel=ADVANCED)
        ] = False,
    ):
        pass

    return typer.main.get_command(app).params


def present_spelling(params, args: list[str]) -> tuple[list[str], list[str]]:
    """The words of a command line with the spellings of earlier releases replaced, and what was replaced, for a notice.

    Args:
        params: the command's options and arguments.
        args (`list[str]`): the words after its name.
    """
    options = {name: param for param in params if isinstance(param, TyperOption) for name in (*param.opts, *param.secondary_opts)}
    words: list[str] = []
    notices: list[str] = []
    rest = deque(args)
    while rest:
        word = rest.popleft()
        name, equals, value = word.partition("=")
        new = name.replace("_", "-")
        if word == "--":
            return [*words, word, *rest], notices
        if not word.startswith("--") or new not in options:
            words.append(word)
            continue
        option, changed = options[new], new + equals + value
        if option.is_flag and (equals or (rest and rest[0].lower() in ("true", "false"))):
            value = value if equals else rest.popleft()
            word, changed = f"{name} {value}", _flag_word(option, new, value)
        if changed != word:
            notices.append(f"{word} is now {changed or 'left out'}")
        words += [changed] if changed else []
    return words, notices


def _flag_word(option: TyperOption, name: str, value: str) -> str:
    """The flag that means the same as this flag with a value; empty if that means to leave the flag out."""
    if value.lower() not in _BOOLEANS:
        raise typer.BadParameter(f"expected true or false, got {value!r}", param_hint=name)
    is_on = _BOOLEANS[value.lower()] == (name in option.opts)
    return option.opts[0] if is_on else next(iter(option.secondary_opts), "")


@contextmanager
def _shown(is_quiet: bool) -> Iterator[None]:
    """Warnings as one line each, or not at all."""
    before, logger = warnings.formatwarning, logging.getLogger("transformers_prism")
    level = logger.level
    warnings.formatwarning = lambda message, *place, **more: f"warning: {message}\n"
    try:
        with warnings.catch_warnings() if is_quiet else nullcontext():
            if is_quiet:
                warnings.simplefilter("ignore")
                logger.setLevel(logging.ERROR)
            yield
    finally:
        warnings.formatwarning = before
        logger.setLevel(level)


def log_information() -> None:
    """Let the package say what it does, unless `--quiet` was given."""
    logger = logging.getLogger("transformers_prism")
    if logger.isEnabledFor(logging.WARNING):
        logger.setLevel(logging.INFO)


@contextmanager
def user_errors(has_traceback: bool | None = None) -> Iterator[None]:
    """End with status 1 and one line about what went wrong.

    Args:
        has_traceback (`bool`, *optional*): whether to show the traceback, too; None raises errors that a user cannot fix.
    """
    try:
        yield
    except (typer.Exit, typer.Abort, typer.BadParameter, BrokenPipeError):  # click handles a closed pipe
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        if not isinstance(error, (ValueError, OSError, ImportError, SafetensorError)):
            if has_traceback is None:
                raise
            text = f"{type(error).__name__}: {text}"
        elif isinstance(error, ModuleNotFoundError):
            text = next((_missing(name, error.name) for name, packages in EXTRAS.items() if error.name in packages), text)
        if has_traceback:
            typer.echo(traceback.format_exc(), err=True, nl=False)
        typer.echo(f"error: {text}", err=True)
        raise typer.Exit(1) from error


def _missing(extra: str, package: str) -> str:
    return f"expected the packages of the extra {extra!r}, got no {package}; pip install {' '.join(EXTRAS[extra])}"


def report_file(path: Path | None) -> None:
    """Say that a file was written, if it was asked for."""
    if path is not None:
        typer.echo(f"wrote {path}")


def add_moved(app: typer.Typer, name: str, command: str) -> None:
    """Add a hidden command for one that was removed: it names the replacement and exits with status 2."""
    settings = {"allow_extra_args": True, "ignore_unknown_options": True}

    @app.command(name, cls=TyperCommand, hidden=True, add_help_option=False, context_settings=settings)
    def moved():
        place = ", in a clone of the repository" if command.startswith("python") else ""
        typer.echo(f"error: `{name}` has moved: use `{command}`{place}", err=True)
        raise typer.Exit(2)

"""Hooks of mkdocs for the documentation site (`make docs`): the tables of errors, and links that leave `docs/`.

The tables are read from the source, so that no message is listed that is not raised.
"""

import ast
import re
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "transformers_prism"
PLACE = "<!-- tables of messages -->"
# Folders and files of the package by what the reader was doing.
TOPICS = {
    "Loading and configuring a draft": (
        "configuration_prism.py",
        "modeling_prism.py",
        "borrowed_layers.py",
        "processing_module.py",
        "target.py",
        "hub/loading.py",
    ),
    "Generating": (
        "generation.py",
        "decoding/",
        "policy/",
        "cpu.py",
        "packed_layers.py",
        "custom_generate/",
        "kernels/",
        "transformers_names.py",
    ),
    "Data and training": ("training/",),
    "Saving and publishing": ("hub/",),
    "Other formats": ("conversion/",),
    "Commands and measurements": ("",),
}
# Functions that return why a target or a call is decoded plainly, or in chains.
_REASONS = ("reason_", "why_")
_WARNING_CALLS = ("warn", "warn_once", "warning", "warning_once")


def messages(path: Path) -> list[tuple[str, str]]:
    """Kind and text of every error that a file raises, every warning and every reason for plain decoding, each once.

    Args:
        path (`Path`): a Python file.
    Returns:
        `list`: of pairs such as `("ValueError", "tree: expected one of ..., got ...")`; what an f-string fills in is
        shown by its expression in angle brackets.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = []
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef) and function.name.startswith(_REASONS):
            returned = [node for node in ast.walk(function) if isinstance(node, ast.Return)]
            found += [(node.lineno, "reason", _words(_text(node.value))) for node in returned if node.value is not None]
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            call, kind = node.exc, ast.unparse(node.exc.func)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in _WARNING_CALLS:
            call, kind = node, "warning"
        else:
            continue
        found.append((node.lineno, kind, _words(next(filter(None, map(_text, call.args)), ""))))
    return list(dict.fromkeys((kind, text) for _, kind, text in sorted(found) if len(text.split()) > 3))


def _words(text: str) -> str:
    return " ".join(text.split())


def _text(node: ast.expr) -> str:
    """The words of a string expression; empty for anything else."""
    match node:
        case ast.Constant(value=str(value)):
            return value
        case ast.JoinedStr(values=parts):
            return "".join(map(_text, parts))
        case ast.FormattedValue(value=value):
            # The last name of an expression says what it is; its calls and indices say nothing to a reader.
            names = re.findall(r"[A-Za-z_]\w*", ast.unparse(value))
            return f"<{names[-1] if names else '...'}>"
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _text(left) + _text(right)
        case ast.IfExp(body=body, orelse=orelse):
            return _text(body) or _text(orelse)
    return ""


def remedy(text: str) -> str:
    """What to do about a message: its last clause if that says so, else what it expected."""
    _, _, advice = text.rpartition("; ")
    if advice != text and re.match(r"(pip|run|use|name|give|set|load|pass|remove|see|write|measure|make|put|add|train|call|load)\b", advice):
        return advice[0].upper() + advice[1:]
    expected = re.search(r"expected (.*?)(?:, got|; got|$)", text)
    return f"Give {expected[1]}" if expected else ""


def error_tables(package: Path = PACKAGE) -> str:
    """Markdown tables of all messages of the package, by topic."""
    files = sorted(package.rglob("*.py"))
    parts, taken = [], set()
    for topic, places in TOPICS.items():
        members = [
            path
            for path in files
            if path not in taken and any(path.relative_to(package).as_posix().startswith(place) for place in places)
        ]
        taken.update(members)
        rows = dict.fromkeys(message for path in members for message in messages(path))
        parts.append(f"## {topic}\n\n| message | kind | what to do |\n|---|---|---|")
        parts[-1] += "".join(f"\n| {_cell(text)} | {kind} | {_cell(remedy(text))} |" for kind, text in rows)
    return "\n\n".join(parts)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_").replace("`", "")


def on_page_markdown(markdown: str, page, **_) -> str:
    """Fill in the tables; a link to a file outside `docs/` becomes the file's name, since the site does not hold it."""
    if page.file.src_uri == "errors.md":
        markdown = markdown.replace(PLACE, error_tables())
    levels = page.file.src_uri.count("/") + 1
    outside = r"\[([^\]]+)\]\(" + r"(?:\.\./){" + str(levels) + r"}([^)]+)\)"
    return re.sub(outside, r"\1 (`\2`)", markdown)

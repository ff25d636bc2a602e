"""Tables in Markdown."""


def markdown_table(heading: list[str], rows: list[list[str]]) -> str:
    """A table, the first column left, the others right."""
    heading = [name.replace("\n", " ") for name in heading]
    lines = [heading, ["---", *["---:"] * (len(heading) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

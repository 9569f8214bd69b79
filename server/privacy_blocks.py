"""Parts of a page that becomes Markdown and HTML."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Block:
    """A part of the page: ``kind`` is heading, text, warning, list or table."""

    kind: str
    text: str = ""
    rows: tuple[tuple[str, ...], ...] = ()


def as_markdown(title: str, blocks: Sequence[Block]) -> str:
    """The page as Markdown."""
    parts = [f"# {title}"]
    for block in blocks:
        if block.kind == "heading":
            parts.append(f"## {block.text}")
        elif block.kind == "warning":
            parts.append(f"**{block.text}**")
        elif block.kind == "list":
            parts.append("\n".join(f"- {row[0]}" for row in block.rows))
        elif block.kind == "table":
            head, *rows = (" | ".join(row) for row in block.rows)
            rule = " | ".join("---" for _ in block.rows[0])
            parts.append("\n".join(f"| {line} |" for line in (head, rule, *rows)))
        else:
            parts.append(block.text)
    return "\n\n".join(parts) + "\n"

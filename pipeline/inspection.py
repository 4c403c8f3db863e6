"""What a bundle is, told from its manifest alone: formats, sizes, the ratio to fp16. Standard library only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import InputRefused
from pipeline.folder import MANIFEST
from pipeline.manifest import read_manifest


def size_text(size_bytes: int) -> str:
    """`512 B`, `1.50 kB`, `42.0 MB`: decimal units, three digits."""
    size, units = float(size_bytes), ["B", "kB", "MB", "GB", "TB"]
    while size >= 999.5 and len(units) > 1:
        size /= 1000
        del units[0]
    digits = 0 if units[0] == "B" or size >= 99.95 else 1 if size >= 9.995 else 2
    return f"{size:.{digits}f} {units[0]}"


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Lines of a Markdown table; a bar inside a cell is escaped."""
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


def inspect_bundle(folder: Path) -> dict[str, Any]:
    """Facts and totals of a bundle, without opening any other file; `ratio` is fp16 bytes over bytes of weights."""
    manifest = read_manifest(folder)
    try:
        formats = manifest.facts["formats"]
        size = sum(row["size_bytes"] for row in formats)
        fp16 = sum(row["fp16_bytes"] for row in formats)
        keys = ("dllmc_version", "created", "status", "model", "recipe", "formats", "completeness", "graph")
        facts = {key: manifest.facts[key] for key in keys}
    except (KeyError, TypeError) as fault:
        raise InputRefused(f"{folder / MANIFEST} lacks a field: {fault}; export the bundle again") from fault
    return {
        **facts,
        "identity": manifest.identity,
        "files": len(manifest.files),
        "bundle_bytes": manifest.size_bytes,
        "weights_bytes": size,
        "fp16_bytes": fp16,
        "ratio": round(fp16 / size, 3) if size else None,
    }


def inspection_lines(folder: Path) -> list[str]:
    """The same for people."""
    found = inspect_bundle(folder)
    model, complete = found["model"], found["completeness"]
    rows = [(r["part"], r["format"], r["tensors"], r["size_bytes"], r["fp16_bytes"]) for r in found["formats"]]
    rows.append(("total", "", sum(row[2] for row in rows), found["weights_bytes"], found["fp16_bytes"]))
    lines = [
        f"{model['source']}   family {model['family']}   recipe {found['recipe']}   {found['status']}",
        f"{model['num_layers']} layers, hidden {model['hidden_size']}, vocabulary {model['vocab_size']}, "
        f"at most {model['max_length']} tokens",
        "",
        *table(
            ("part", "format", "tensors", "size", "at fp16", "ratio"),
            [
                (part, form, count, size_text(size), size_text(fp16), f"{fp16 / size:.2f}" if size else "-")
                for part, form, count, size, fp16 in rows
            ],
        ),
        "",
        f"{complete['tensors_used']} of {complete['tensors_total']} tensors used, "
        f"{complete['linears_quantised']} of {complete['linears_total']} linears quantised "
        f"({complete['linears_kept']} kept at 16 bits by the recipe)",
        f"{found['files']} files, {size_text(found['bundle_bytes'])}, identity {found['identity']}",
    ]
    # A stranger's manifest may hold terminal escapes.
    return ["".join(letter if letter.isprintable() else "?" for letter in line) for line in lines]

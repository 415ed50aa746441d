"""Print the longest modules and functions, and import circles; exit with 1 beyond the limits.

    python tools/structure.py [--top N]

Counted are the lines of modules, all of them, and of functions, without their docstrings and
without the functions within them. Imports inside functions count too; those for type checkers
do not.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Collection, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = {"qcat": ROOT, "qcat_convert": ROOT / "convert"}
MODULE_LINES, FUNCTION_LINES = 400, 60


def modules() -> dict[str, Path]:
    """The project's modules by name."""
    found = {}
    for package, folder in SOURCES.items():
        for path in sorted((folder / package).glob("**/*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


def imported(tree: ast.AST, known: Collection[str]) -> Iterator[str]:
    """Names of all modules that code imports, but for type checkers."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from (name if name in known else node.module for name in names)
        else:
            yield from imported(node, known)


def functions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, int]]:
    """Each function's name and lines, without a docstring's and those of options of a command."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            doc = ast.get_docstring(node, clean=False)
            inner = list(functions(node, f"{prefix}{node.name}."))
            within = sum(length for _, length in inner)
            yield f"{prefix}{node.name}", lines - (doc.count("\n") + 1 if doc else 0) - within
            yield from inner
        elif isinstance(node, ast.ClassDef):
            yield from functions(node, f"{prefix}{node.name}.")
        else:
            yield from functions(node, prefix)


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import each other round; empty if none do."""
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        return list(error.args[1])
    return []


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--top", type=int, default=10, help="how many of each to print")
    top = parser.parse_args().top
    paths = modules()
    trees = {name: ast.parse(path.read_text("utf-8")) for name, path in paths.items()}
    lengths = {name: len(path.read_text("utf-8").splitlines()) for name, path in paths.items()}
    parts = {f"{m}.{f}": length for m, tree in trees.items() for f, length in functions(tree)}
    graph = {name: {*imported(tree, paths)} & paths.keys() - {name} for name, tree in trees.items()}
    for what, limit, found in (
        ("modules", MODULE_LINES, lengths),
        ("functions", FUNCTION_LINES, parts),
    ):
        print(f"{what} by lines, at most {limit}:")
        for name, length in sorted(found.items(), key=lambda item: -item[1])[:top]:
            print(f"  {length:4} {name}{'  <- too long' if length > limit else ''}")
    round_trip = circle(graph)
    print("import circle: " + (" -> ".join(round_trip) or "none"))
    too_long = any(n > MODULE_LINES for n in lengths.values())
    sys.exit(too_long or any(n > FUNCTION_LINES for n in parts.values()) or bool(round_trip))


if __name__ == "__main__":
    main()

"""What CONTRIBUTING says of the modules: no circle of imports, no long file without a reason."""

import ast
from pathlib import Path

import grimp

ROOT = Path(__file__).parents[1]
PACKAGES = ("lightning_tucodec", "data_pipelines")
ABOUT_400 = 425


def test_no_file_imports_itself_by_way_of_others() -> None:
    """Also by imports inside functions and for types alone."""
    graph = grimp.build_graph(*PACKAGES)
    above = {m: set(graph.find_modules_directly_imported_by(m)) for m in graph.modules}
    while leaves := [module for module, imported in above.items() if not imported]:
        for module in leaves:
            del above[module]
        for imported in above.values():
            imported.difference_update(leaves)
    assert not above, "in a circle, or above one"


def test_a_long_file_says_why() -> None:
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            text = path.read_text()
            if text.count("\n") > ABOUT_400:
                assert "One file because" in (ast.get_docstring(ast.parse(text)) or ""), path

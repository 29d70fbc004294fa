"""The notebook as a document: sections, cells, style."""

import ast
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

import nbtools

ROOT = nbtools.NOTEBOOK.parent
SECTIONS = [
    "1. Imports and Setup",
    "2. Dataset Verification",
    "3. Model Setup Test",
    "4. Dataset Class and Data Loading",
    "5. Load Dataset",
    "6. Visualize Dataset",
    "7. Model Setup",
    "8. Loss Function and Metrics",
    "9. Training Function",
    "10. Start Training",
    "11. Visualize Learning Curves",
    "12. Inference on Test Set",
    "13. Map a Scene",
    "14. Export",
]
CELLS = nbformat.read(nbtools.NOTEBOOK, as_version=4).cells
CODE = [cell for cell in CELLS if cell.cell_type == "code"]
PROSE = [cell for cell in CELLS if cell.cell_type == "markdown"]


def ruff(*words: str) -> subprocess.CompletedProcess:
    """Run ruff in the repository's root."""
    return subprocess.run(
        [sys.executable, "-m", "ruff", *words], cwd=ROOT, capture_output=True, text=True
    )


def code_lines(cell: nbformat.NotebookNode) -> int:
    """Lines of a cell that are neither blank nor comments."""
    return sum(
        bool(line.strip()) and not line.strip().startswith("#") for line in cell.source.splitlines()
    )


def test_stored_clean():
    raw = json.loads(nbtools.NOTEBOOK.read_text(encoding="utf-8"))
    nbformat.validate(raw)
    assert raw["metadata"]["kernelspec"]["name"] == "python3"
    assert all(cell.outputs == [] and cell.execution_count is None for cell in CODE)
    assert len({cell.id for cell in CELLS}) == len(CELLS)


def test_sections_in_order_with_an_opening_paragraph():
    heads = [cell.source for cell in PROSE if cell.source.startswith("## ")]
    assert [head.splitlines()[0][3:] for head in heads] == SECTIONS
    assert all(len(head.split("\n\n")[1]) > 80 for head in heads)


def test_no_heading_level_is_skipped():
    text = "\n".join(cell.source for cell in PROSE)
    levels = [len(marks) for marks in re.findall(r"^(#+) ", text, flags=re.M)]
    assert all(b - a <= 1 for a, b in zip(levels, levels[1:], strict=False))


def test_contents_link_to_the_sections():
    links = re.findall(r"\(#([^)]+)\)", CELLS[0].source)
    heads = {
        line.lstrip("# ").replace(" ", "-")
        for c in PROSE
        for line in c.source.splitlines()
        if line[:1] == "#"
    }
    assert set(links) <= heads and len(links) >= len(SECTIONS)


def test_one_import_cell_and_one_parameters_cell():
    imports = [
        c.id
        for c in CODE
        if any(isinstance(n, ast.Import | ast.ImportFrom) for n in ast.walk(ast.parse(c.source)))
    ]
    assert imports == ["imports"]
    assert [c.id for c in CODE if "parameters" in c.metadata.get("tags", [])] == ["settings"]


@pytest.mark.parametrize("cell", CODE, ids=lambda cell: cell.id)
def test_a_cell_defines_or_acts_and_fits_a_screen(cell):
    kinds = {nbtools.is_definition(node) for node in ast.parse(cell.source).body}
    assert len(kinds) == 1
    assert code_lines(cell) <= {"imports": 59, "config-class-2": 42}.get(cell["id"], 40)


def test_budget():
    """Lines of code, their length, and cells and functions that fit a screen."""
    lines = [code_lines(cell) for cell in CODE]
    assert sum(lines) <= 2528 and statistics.median(lines) <= 15
    assert max(len(line) for cell in CODE for line in cell.source.splitlines()) <= 100
    assert len(PROSE) >= 0.8 * len(CODE)
    functions = [
        node
        for cell in CODE
        for node in ast.walk(ast.parse(cell.source))
        if isinstance(node, ast.FunctionDef)
    ]
    assert max(f.end_lineno - f.lineno + 1 for f in functions) <= 40


def test_settings_come_first_and_pictures_early():
    ids = [cell.id for cell in CODE]
    assert ids[:2] == ["imports", "settings"]
    assert sum(code_lines(cell) for cell in CODE[: ids.index("sample-run") + 1]) <= 537


def test_papermill_lists_every_setting(defaults):
    words = [sys.executable, "-m", "papermill", "--help-notebook", str(nbtools.NOTEBOOK)]
    text = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert [name for name in defaults if f"  {name}: " not in text] == []
    assert "a label is named like its image" in text  # with what they mean


def test_a_name_of_digits_alone_is_asked_for_as_text(nb, defaults):
    with pytest.raises(
        ValueError, match="images_dir = 2024: .*papermill's -r passes digits as text"
    ):
        nb.make_config(**defaults | {"images_dir": 2024})
    assert nb.make_config(**defaults | {"images_dir": "2024"}).images_dir == "2024"


def test_ruff_lints_and_formats():
    for words in (["check"], ["format", "--check"]):
        result = ruff(*words, "main.ipynb", "tests")
        assert result.returncode == 0, result.stdout


def test_no_definition_reads_a_notebook_variable(tmp_path):
    source = "\n\n".join(cell.source for cell in nbtools.definition_cells())
    (tmp_path / "definitions.py").write_text(source)
    result = ruff("check", "--isolated", "--select", "F821", str(tmp_path / "definitions.py"))
    assert result.returncode == 0, result.stdout


FILTER = r"^ {0,4}\w.*filterwarnings"  # one that lasts longer than a single call


@pytest.mark.parametrize("pattern", ["except:", FILTER, r"^\s*[!%]", "/home/", "/work/"])
def test_forbidden(pattern):
    found = [cell.id for cell in CODE if re.search(pattern, cell.source, flags=re.M)]
    assert not found


def test_readme_lists_every_setting_with_its_default(defaults):
    rows = re.findall(
        r"^\| `(\w+)` \| `([^`]+)` \|",
        Path(ROOT / "README.md").read_text(encoding="utf-8"),
        flags=re.M,
    )
    assert {name: ast.literal_eval(value) for name, value in rows} == defaults


def walk_scope(node: ast.AST) -> list[ast.AST]:
    """The nodes that are not in a comprehension or lambda, which have names of their own."""
    if isinstance(node, ast.ListComp | ast.DictComp | ast.SetComp | ast.GeneratorExp | ast.Lambda):
        return []
    return [node, *(inner for child in ast.iter_child_nodes(node) for inner in walk_scope(child))]


def test_no_cell_overwrites_a_setting(defaults):
    """So that the cell that checks the settings can be run again at any time."""
    written = {
        (cell.id, node.id)
        for cell in CODE
        if not nbtools.is_definition(ast.parse(cell.source).body[0]) and cell.id != "settings"
        for statement in ast.parse(cell.source).body
        for node in walk_scope(statement)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }
    assert not {(cell, name) for cell, name in written if name in defaults}

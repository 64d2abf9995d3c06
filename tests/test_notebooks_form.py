"""What all notebooks have in common: first cells, width of the code, exercises, outputs."""

import json
import re
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
PATHS = sorted((ROOT / "ipynb").glob("*.ipynb"))
COLUMNS = 88            # what JupyterLab shows beside its sidebar on a laptop
CELL_LINES = 18
MEGABYTES = 1.5


@pytest.fixture(params=PATHS, ids=lambda path: path.stem)
def path(request):
    return request.param


@pytest.fixture
def notebook(path):
    return nbformat.read(path, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def markdown(notebook):
    return "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def test_the_title_is_followed_by_a_chinese_abstract(notebook):
    title, _, rest = notebook.cells[0].source.partition("\n")
    assert re.fullmatch(r"# [A-Z].*", title), title
    abstract = re.search(r"\*\*摘要", rest)
    assert abstract and len(re.findall(r"[\u4e00-\u9fff]", rest)) > 60


def test_the_first_code_cell_is_the_same_everywhere(notebook):
    def without_duration(source):
        return re.sub(r'start_notebook\(".*"\)', "start_notebook()", source)

    first = nbformat.read(PATHS[0], as_version=4)
    ours, theirs = (without_duration(code_cells(x)[0].source) for x in (notebook, first))
    assert ours == theirs and "start_notebook()" in ours


def test_code_is_narrow_and_cells_are_short(notebook):
    for cell in code_cells(notebook):
        lines = cell.source.splitlines()
        assert len(lines) <= CELL_LINES, cell.source
        assert max(map(len, lines)) <= COLUMNS, max(lines, key=len)


def test_there_is_more_text_than_code(notebook):
    text = markdown(notebook).split()
    assert len(text) > 2 * sum(len(cell.source.splitlines()) for cell in code_cells(notebook))


def test_exercises_have_collapsed_solutions(notebook):
    assert "## Exercises" in markdown(notebook)
    solutions = [cell for cell in code_cells(notebook) if cell.source.startswith("# Solution")]
    assert len(solutions) >= 2
    for cell in solutions:
        assert cell.metadata["jupyter"]["source_hidden"] is True


def test_links_lead_to_files(path, notebook):
    for link in re.findall(r"\]\(([^)#\s]+)", markdown(notebook)):
        if not link.startswith(("http", "attachment:")):
            assert (path.parent / link).exists(), link


def test_nothing_is_written_to_tracked_folders(notebook):
    for cell in code_cells(notebook):
        assert not re.search(r"\.\./|[\"']image/|root / \"(?!out)", cell.source), cell.source


def test_outputs_are_those_of_one_complete_run(path, notebook):
    counts = [cell.execution_count for cell in code_cells(notebook) if cell.source.strip()]
    assert counts == list(range(1, len(counts) + 1))
    for cell in code_cells(notebook):
        for output in cell.outputs:
            assert output.output_type != "error"
            shown = json.dumps(output, ensure_ascii=False)
            assert "widget-view" not in shown
            text = output.get("text", "") + output.get("data", {}).get("text/plain", "")
            assert "Traceback" not in text
            assert not re.search(r"/(home|root|work|tmp|check|Users)/", text), text
    assert "widgets" not in notebook.metadata
    assert path.stat().st_size < MEGABYTES * 1e6

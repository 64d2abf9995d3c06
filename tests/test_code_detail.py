"""code_detail.md says where each formula is computed, and in which words: those words must stand there."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "code_detail.md").read_text()
PLACES = re.findall(r"\[(\w+\.py)\]\(([\w/]+\.py)\) `([\w.]+)`(?:: `([^`\n]+)`)?", TEXT)


def source(path, name):
    """The text of a function, or of a class's function, of a file."""
    text = (ROOT / path).read_text()
    body = ast.parse(text).body
    for part in name.split("."):
        node, = [node for node in body if getattr(node, "name", None) == part]
        body = node.body
    return ast.get_source_segment(text, node).replace(ast.get_docstring(node, clean=False) or '"""', "")


def test_each_formula_stands_where_it_says():
    assert len(PLACES) > 50
    for file, path, name, words in PLACES:
        assert path.endswith("/" + file)
        code = " ".join(source(path, name).split())
        assert words in code, f"{path}, {name}: {words}"


def test_each_link_and_each_test_exists():
    for link in re.findall(r"\]\(([^)#:]+)\)", TEXT):
        assert (ROOT / link).exists(), link
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("*.py"))
    for name in re.findall(r"`(test_\w+)`", TEXT):
        assert f"def {name}(" in tests, name
    for path in re.findall(r"`(tests/\w+\.py)`", TEXT):
        assert (ROOT / path).exists(), path

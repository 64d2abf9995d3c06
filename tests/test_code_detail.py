"""code_detail.md quotes the code that computes each formula; the source must contain that code."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "code_detail.md").read_text("utf-8")

# [samplers.py](easy_diffusion/diffusion/samplers.py) `ddim_step`: `quoted code`, `more quoted code`
REFERENCES = re.findall(r"\[(\w+\.py)\]\(([\w/]+\.py)\) `([\w.]+)`((?:[:,] `[^`\n]+`)*)", TEXT)


def read_source(path, name):
    """The source of a function, `ddim_step`, or of a method, `UNet.forward`, without docstring."""
    text = (ROOT / path).read_text("utf-8")
    body = ast.parse(text).body
    for part in name.split("."):
        node, = [node for node in body if getattr(node, "name", None) == part]
        body = node.body
    source = ast.get_source_segment(text, node)
    docstring = ast.get_docstring(node, clean=False)
    return source.replace(docstring, "") if docstring else source


def normalize(code):
    """Code as one line, so that a line break between brackets makes no difference."""
    code = " ".join(code.split())
    return re.sub(r"(?<=[(\[{]) | (?=[)\]}])|,(?= ?[)\]}])", "", code)


def test_each_quoted_code_is_in_the_function_that_is_named():
    assert len(REFERENCES) > 50
    for file, path, name, quotes in REFERENCES:
        assert path.endswith("/" + file)
        source = normalize(read_source(path, name))
        for code in re.findall(r"`([^`\n]+)`", quotes):
            assert normalize(code) in source, f"{path}, {name}: {code}"


def test_each_link_and_each_test_exists():
    for link in re.findall(r"\]\(([^)#:]+)\)", TEXT):
        assert (ROOT / link).exists(), link
    tests = "".join(path.read_text("utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", TEXT):
        assert f"def {name}(" in tests, name
    for path in re.findall(r"`(tests/[\w/]+\.py)`", TEXT):
        assert (ROOT / path).exists(), path

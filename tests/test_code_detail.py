"""code_detail.md and code_detail.zh-CN.md quote the code that computes each formula.

The functions must contain the quoted code, and both languages must have the same contents.
"""

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = ("code_detail.md", "code_detail.zh-CN.md")
TEXTS = {page: (ROOT / page).read_text("utf-8") for page in PAGES}

# [samplers.py](easy_diffusion/diffusion/samplers.py) `ddim_step`: `quoted code`, `more quoted code`
# A line may end between any two of these parts. Chinese text has a colon of its own.
REFERENCE = r"\[(\w+\.py)\]\(([\w/]+\.py)\)\s+`([\w.]+)`((?:[:：,]\s*`[^`\n]+`)*)"
DISPLAY_FORMULA = r"^\$\$\n(.*?)\n\$\$$"
INLINE_CODE = r"`[^`\n]+`"
INLINE_FORMULA = r"\$([^$\n]+)\$"
LINK = r"\]\(([^)]+)\)"

# The forward step and the reverse SDE: the code computes what follows from them.
FORMULAS_WITHOUT_CODE = ("$$\nq(x_t \\mid x_{t-1})", "$$\ndx = -g^2")


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


def prose(text):
    """The text without display formulas, code blocks and inline code."""
    text = re.sub(DISPLAY_FORMULA, "", text, flags=re.S | re.M)
    text = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    return re.sub(INLINE_CODE, "", text)


def linked_pages(text):
    """The links in alphabetical order, a Chinese page under the name of the English one.

    A page that exists in both languages, `NAME.md` and `NAME.zh-CN.md`, is linked in the language
    of the text, except by the link from one language to the other. All other links are equal.
    """
    return sorted(link.replace(".zh-CN.md", ".md") for link in re.findall(LINK, text))


def assert_same(read):
    """What `read` returns for the text of a page is the same in both languages."""
    english, chinese = (read(TEXTS[page]) for page in PAGES)
    assert english
    assert english == chinese


@pytest.mark.parametrize("page", PAGES)
def test_each_quoted_code_is_in_the_function_that_is_named(page):
    references = re.findall(REFERENCE, TEXTS[page])
    assert len(references) > 80
    for file, path, name, quotes in references:
        assert path.endswith("/" + file)
        assert quotes, f"{path}, {name}: no code is quoted"
        source = normalize(read_source(path, name))
        for code in re.findall(r"`([^`\n]+)`", quotes):
            assert normalize(code) in source, f"{path}, {name}: {code}"


@pytest.mark.parametrize("page", PAGES)
def test_each_display_formula_is_followed_by_its_code(page):
    """A paragraph of code may belong to several formulas in a row."""
    paragraphs = TEXTS[page].split("\n\n")
    is_formula = [paragraph.startswith("$$") for paragraph in paragraphs]
    is_code = [paragraph.startswith(("Code: ", "代码：")) for paragraph in paragraphs]
    assert sum(is_formula) > 70
    for i, paragraph in enumerate(paragraphs):
        if is_formula[i] and not paragraph.startswith(FORMULAS_WITHOUT_CODE):
            assert is_formula[i + 1] or is_code[i + 1], paragraph
        if is_code[i]:
            assert re.search(REFERENCE, paragraph), paragraph


@pytest.mark.parametrize("page", PAGES)
def test_each_link_and_each_test_exists(page):
    text = TEXTS[page]
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / link).exists(), link
    tests = "".join(path.read_text("utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", text):
        assert f"def {name}(" in tests, name
    for path in re.findall(r"`(tests/[\w/]+\.py)`", text):
        assert (ROOT / path).exists(), path
    for name in re.findall(r"`python -m benchmarks\.(\w+)", text):
        assert (ROOT / "benchmarks" / f"{name}.py").exists(), name


@pytest.mark.parametrize("page", PAGES)
def test_inline_formulas_render_on_github(page):
    """GitHub needs a space before a formula and no letter after it; Chinese characters count."""
    text = prose(TEXTS[page])
    assert "$$" not in text
    for line in text.splitlines():
        assert line.count("$") % 2 == 0, line
        for formula in re.finditer(INLINE_FORMULA, line):
            assert line[:formula.start()][-1:] in ("", " "), line
            assert not line[formula.end():][:1].isalnum(), line
    # Markdown would remove the backslash of these.
    for formula in re.findall(r"\$+([^$]+)\$+", re.sub(INLINE_CODE, "", TEXTS[page])):
        assert not re.search(r"\\[^A-Za-z]|\*", formula), formula


@pytest.mark.parametrize("page", PAGES)
def test_lines_are_short(page):
    """At most 100 columns; tables, formulas and single quotes of code may be longer."""
    text = re.sub(DISPLAY_FORMULA, "", TEXTS[page], flags=re.S | re.M)
    for line in text.splitlines():
        columns = len(line) + len(re.findall(r"[\u3000-\u9fff\uff00-\uffef]", line))
        is_one_quote = re.fullmatch(INLINE_CODE + "[,;；]?", line)
        assert columns <= 100 or line.startswith("|") or is_one_quote, line


def test_both_languages_have_the_same_display_formulas_in_the_same_order():
    assert_same(lambda text: re.findall(DISPLAY_FORMULA, text, re.S | re.M))


def test_both_languages_have_the_same_inline_formulas():
    assert_same(lambda text: set(re.findall(INLINE_FORMULA, prose(text))))


def test_both_languages_have_the_same_code():
    """The order of the references is the same; that of code within sentences may differ."""
    assert_same(lambda text: [
        (path, name, re.findall(INLINE_CODE, quotes))
        for _, path, name, quotes in re.findall(REFERENCE, text)
    ])
    assert_same(lambda text: Counter(re.findall(INLINE_CODE, text)))
    blocks = [re.findall(r"^```.*?^```", TEXTS[page], re.S | re.M) for page in PAGES]
    assert blocks[0] == blocks[1]


def test_both_languages_have_the_same_links():
    assert_same(linked_pages)
    for page, other in (PAGES, PAGES[::-1]):
        assert f"]({other})" in TEXTS[page][:200]
        assert f"]({page})" not in TEXTS[page]
    assert "](README.zh-CN.md)" not in TEXTS[PAGES[0]]
    assert "](README.md)" not in TEXTS[PAGES[1]]


def test_both_languages_have_the_same_headings_and_tables():
    assert_same(lambda text: re.findall(r"^#+(?= )", text, re.M))
    assert_same(lambda text: [line.count("|") for line in text.splitlines() if line[:1] == "|"])


def test_both_languages_have_the_same_figures():
    """Numbers outside code and formulas: measurements, dates, years and numbers of equations."""
    def figures(text):
        text = re.sub(INLINE_FORMULA, "", prose(text))
        text = re.sub(LINK, "]", text)
        return Counter(re.findall(r"\d[\d.,]*\d|\d", text))

    assert_same(figures)

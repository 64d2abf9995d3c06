"""The package's layout: import rules, no cycles, and every file or folder copies out."""

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "easy_diffusion"
NOTEBOOKS = sorted((ROOT / "ipynb").glob("*.ipynb"))

# From the bottom up. A file imports only from its own folder or from a lower layer.
LAYERS = [
    {"diffusion", "networks", "files", "images", "diagrams", "command_line", "datasets"},
    {"training", "evaluation", "latent_space", "animation"},
    {"inpainting", "editing"},
    {"presets", "pretrained", "generate", "dish_classifier", "photo_presets", "notebook",
     "masked_dishes", "film_presets", "condition_presets"},
    {
        "command_setup", "demo", "demo_options", "train_demo", "train_photos", "train_control",
        "train_motion", "train_sound", "classify", "edit",
        "app", "app_requests", "train_model", "train_options", "train_setup",
    },
]
STANDALONE = LAYERS[0]                      # these import nothing else from the project
FOLDERS = {
    "diffusion", "networks", "training", "inpainting", "editing", "animation", "evaluation",
}


def module_name(path):
    """easy_diffusion/diffusion/samplers.py → "easy_diffusion.diffusion.samplers"."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {
    module_name(path): path
    for folder in (PACKAGE, ROOT / "datasets")
    for path in sorted(folder.rglob("*.py"))
}


def subject(module):
    """The folder or top-level file that a module belongs to: "diffusion", "files", "datasets"."""
    parts = module.split(".")
    if parts[0] == "datasets":
        return "datasets"
    return parts[1] if len(parts) > 1 else ""


def layer(module):
    """The index of a module's layer; the package's own __init__ is below all."""
    if not subject(module):
        return -1
    index, = [i for i, names in enumerate(LAYERS) if subject(module) in names]
    return index


def imported_modules(tree, module=None):
    """All modules of the project that a syntax tree imports, also inside functions."""
    is_package = module in MODULES and MODULES[module].name == "__init__.py"
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                parents = parts[: len(parts) - node.level + is_package]
                base = ".".join([*parents, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else base for name in names]
        else:
            continue
        yield from names


def imports(module):
    """The modules of the project that a module imports."""
    tree = ast.parse(MODULES[module].read_text("utf-8"))
    return {name for name in imported_modules(tree, module) if name in MODULES}


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_its_own_folder_and_lower_layers(module):
    for name in imports(module):
        if subject(name) == subject(module):
            continue
        same_layer_of_files = layer(name) == layer(module) and subject(name) not in FOLDERS
        top_level_files = same_layer_of_files and subject(module) not in FOLDERS
        assert layer(name) < layer(module) or top_level_files, f"{module} imports {name}"
        assert subject(module) not in STANDALONE, f"{module} imports {name}"


@pytest.mark.parametrize("module", MODULES)
def test_imports_inside_a_package_are_relative(module):
    text = MODULES[module].read_text("utf-8")
    assert not re.search(rf"^\s*(from|import) {module.split('.')[0]}\b", text, re.M)


@pytest.mark.parametrize("module", [name for name in MODULES if subject(name) in STANDALONE])
def test_what_copies_out_alone_imports_no_parent_package(module):
    text = MODULES[module].read_text("utf-8")
    assert not re.search(r"^\s*from \.\.", text, re.M)


def test_there_is_no_import_cycle():
    finished, path = set(), []

    def visit(module):
        assert module not in path, " → ".join([*path[path.index(module):], module])
        if module in finished:
            return
        path.append(module)
        for name in imports(module):
            if MODULES[name].parent != MODULES[module].parent or MODULES[name].stem != "__init__":
                visit(name)
        path.pop()
        finished.add(module)

    for module in MODULES:
        visit(module)


def test_file_names_are_unique_in_the_package_and_in_the_tests():
    for folder in (PACKAGE, ROOT / "tests"):
        paths = folder.rglob("*.py")
        names = [path.name for path in paths if path.stem not in ("__init__", "conftest")]
        assert len(names) == len(set(names))


def test_nothing_outside_benchmarks_imports_from_it():
    for path in [*MODULES.values(), *(ROOT / "tests").rglob("*.py")]:
        assert not re.search(r"^\s*(from|import) benchmarks\b", path.read_text("utf-8"), re.M), path


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_imports_from_the_package_and_the_datasets_alone(path):
    cells = json.loads(path.read_text("utf-8"))["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    code = re.sub(r"^\s*[%!].*$", "", code, flags=re.M)
    for name in imported_modules(ast.parse(code)):
        assert name.split(".")[0] not in ("benchmarks", "tests"), name
        if name.split(".")[0] in ("easy_diffusion", "datasets"):
            assert name in MODULES, f"{name} does not exist"


# ---------------------------------------------------------------- copying out

EXAMPLES = """
import doctest, importlib, sys
failures = []
for name in sys.argv[1:]:
    try:
        result = doctest.testmod(importlib.import_module(name))
    except Exception as error:
        failures.append(f"{name} cannot be imported: {error}")
        continue
    if result.attempted == 0:
        failures.append(f"{name} has no example")
    if result.failed:
        failures.append(f"{name}: {result.failed} lines of its example fail")
sys.exit("\\n".join(failures) or 0)
"""


def run_examples(modules, folder):
    """Import modules in a folder and run their docstrings' examples, all in one process."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", EXAMPLES, *modules],
        cwd=folder, capture_output=True, text=True, timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def named_files(path):
    """The files beside a module that its docstring names."""
    words = re.findall(r"\b(\w+\.py)\b", ast.get_docstring(ast.parse(path.read_text("utf-8"))))
    return {path.with_name(word) for word in words if path.with_name(word).exists()}


def test_each_file_copies_out_with_the_siblings_that_its_docstring_names(tmp_path):
    """Each into a folder of its own, in which it finds nothing else of the project."""
    modules = []
    for path in MODULES.values():
        if subject(module_name(path)) not in STANDALONE or path.stem == "__init__":
            continue
        folder = tmp_path / f"copy_of_{path.stem}"
        folder.mkdir()
        for file in {path} | named_files(path):
            shutil.copy(file, folder)
        modules.append(f"{folder.name}.{path.stem}")
    run_examples(modules, tmp_path)


def test_each_folder_copies_out_with_what_its_docstring_names(tmp_path):
    """`training/` or `files.py` in the docstring of `__init__.py` is the one beside the folder."""
    modules = []
    for folder in sorted(FOLDERS):
        source, target = PACKAGE / folder, tmp_path / f"copy_of_{folder}"
        docstring = ast.get_docstring(ast.parse((source / "__init__.py").read_text("utf-8")))
        for word in {folder, *re.findall(r"\b(\w+)/", docstring)} & FOLDERS:
            shutil.copytree(PACKAGE / word, target / word)
        for word in set(re.findall(r"\b(\w+\.py)\b", docstring)):
            if (PACKAGE / word).exists():
                shutil.copy(PACKAGE / word, target)
        modules += [
            f"{target.name}.{folder}.{path.stem}"
            for path in source.glob("*.py") if path.stem != "__init__"
        ]
    run_examples(modules, tmp_path)


def test_the_whole_package_copies_out_and_the_examples_of_its_top_level_files_run(tmp_path):
    for name in ("easy_diffusion", "datasets", "weights"):
        shutil.copytree(ROOT / name, tmp_path / name)
    modules = [path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__"]
    run_examples([f"easy_diffusion.{name}" for name in modules], tmp_path)


@pytest.mark.parametrize("folder", sorted(FOLDERS))
def test_a_folders_docstring_lists_its_files_and_it_exports_public_names(folder):
    path = PACKAGE / folder / "__init__.py"
    tree = ast.parse(path.read_text("utf-8"))
    docstring = ast.get_docstring(tree)
    for file in path.parent.glob("*.py"):
        if file.stem != "__init__":
            assert re.search(rf"\b{file.stem}\b", docstring), f"{file.name} is missing"
    exported, = [
        ast.literal_eval(node.value) for node in tree.body
        if isinstance(node, ast.Assign) and node.targets[0].id == "__all__"
    ]
    imported = [
        alias.asname or alias.name
        for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names
    ]
    assert sorted(exported) == sorted(imported) and len(exported) == len(set(exported))


OPTIONAL = ("cn_clip", "diffusers", "transformers", "tensorboard", "pyarrow", "gradio")


def test_importing_every_folder_imports_no_optional_package():
    folders = "".join(f"import easy_diffusion.{name}\n" for name in sorted(FOLDERS))
    program = (
        "import sys, datasets\n"
        + folders
        + "from easy_diffusion.diffusion import GaussianDiffusion, NoiseSchedule, ddim, guided\n"
        f"print(sorted(set({OPTIONAL!r}) & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout == "[]\n", done.stdout + done.stderr

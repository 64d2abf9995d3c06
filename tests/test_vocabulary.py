"""Code and text speak the field's language: no private words in identifiers, docstrings, messages,
notebooks and documents.

Each rule is a pattern and the standard term to write in its place. `ALLOWED` lists the few uses
that are meant, each with its reason. An entry that is no longer needed fails, too.
"""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
THIS = Path(__file__).resolve()
FILES = sorted(
    path
    for folder in ("easy_diffusion", "datasets", "benchmarks", "tests")
    for path in (ROOT / folder).rglob("*.py")
    if path.resolve() != THIS
)

DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
DOCUMENTS.remove(ROOT / "docs" / "renamed.md")          # the table of the old names
NOTEBOOKS = sorted((ROOT / "ipynb").glob("*.ipynb"))

# What stands before an identifier's part: neither a letter nor a digit. `_` joins parts.
START = r"(?<![A-Za-z0-9])"

RULES = {
    # images and what is done to them
    START + r"[Pp]ictures?(?![a-z])": "image",
    START + r"[Dd]rawings?(?![a-z])": "image",
    START + r"(un)?[Pp]aint(s|ed|er|ers|ing)?(?![a-z])": "inpaint, inpainter",
    START + r"repaint(s|ed|er|ers|ing)(?![a-z])": "inpaint; RePaint for the algorithm",
    r"\brepaint\b(?!\.py|_| import)": "inpaint; RePaint for the algorithm",
    r"\b(gives?|giving|given|gave) back\b|given_back": "reconstructs, reconstruction",
    # conditioning
    START + r"words(?![a-z])": "context, token embeddings, caption",
    START + r"states(?![a-z])": "context, token embeddings",
    r"«nothing»|\bnothing\b\s*(=|\)|,|\.x0|\.eps)|_nothing\b": "uncond",
    # schedules and predictions
    r"(?<!import )(?<!to-)" + START + r"signal\b(?!\.|-)": "alpha_t",
    r"\bamount\b": "sigma_t",
    r"\bpredicts\s*(=|:|\))|\.predicts\b|--predicts\b": "prediction_type",
    r"\bsignal_and_noise\b": "alpha_sigma",
    START + r"answers?(?![a-z])": "output, prediction",
    # randomness
    r"\bdice\b|" + START + r"chance(?![a-z])|\bnumber_of\b":
        "randomness, rng, derive_seed, fork_rng",
    START + r"heaps?(?![a-z])": "mixture component",
    # sampling and attention
    r"\bwalk(s|ed|ing)?\b|_walk\b|\bway home\b": "sampling loop, trajectory",
    r"\blooks? at (each other|the words|itself)\b|\bplaces (look|attend)\b":
        "positions attend to",
    r"\bRemembered\b|\bremember(s|ed)?\b": "key/value cache, cache_context",
    r"\bof_timesteps\b|\bexpanded\(|\bcaptions_for\b|\btogether\(|\bstacked\(":
        "extract, broadcast_like, check_batch, batched_guidance, concat_contexts",
    # training
    START + r"pieces(?![a-z])|\bin one go\b|\bin_one_go\b": "micro-batches, gradient accumulation",
    r"\bfollow\(|\bshorten\(|\bset_rates\b|\bClock\.factor\b":
        "update_ema, clip_grad_norm, set_learning_rates, lr_multiplier",
    r"\bbegin_alike\b|\ball_at\b|\bin_common\b|\banywhere\b":
        "broadcast_parameters, check_same_step, reduce_metrics, any_rank",
    START + r"[Gg]uard(s|ed)?(?![a-z])": "TrainingHealth, training health",
    r"\bill\b|" + START + r"(trouble|rescue[sd]?)(?![a-z])|ran out of patience":
        "unhealthy, reason, roll back",
    START + r"settle[sd]?(?![a-z])": "plateaued (loss), recover (LMDB), fine-tune (SGD)",
    r"\bShuffled\b|\bas_it_is\b|" + START + r"endless(?![a-z])|\bbatches\(":
        "ResumableBatchSampler, identity, infinite_batches, make_loader",
    # evaluation
    START + r"(?<!open_)[Rr]eader(?!s)|fully.right": "attribute classifier, exact match",
    r"\bthe share\b|\bshares? of\b|" + START + r"share\s*[=(]": "fraction, accuracy",
    r"(?<!tandard )(?<!tandard_)" + START + r"[Dd]eviations?(?![a-z])": "standard deviation, std",
    START + r"spreads?(?![a-z])": "standard deviation, range",
    r"\bfewer numbers\b|\bmean over its numbers\b": "compression; values, elements",
    # everything
    r"\b[Ff]oreign\b|\b[Ss]trangers?\b|\bstrange\b|\bof another kind\b": "incompatible, unexpected",
    r"\bhouse\b|\broofs?\b|\brecipes?\b|\bcooks?\b": "package, entry point, preset",
    r"\bdef \w+_of\(": "a verb: build_…, load_…, make_…, compute_…",
}

OLD_FILES = "a key of files that an earlier version wrote"
CLAIM = "the fixed name of a claim in benchmarks/results"
INGREDIENTS = "a piece of an ingredient in a drawn dish"
HOWTOCOOK = "a cooking recipe of HowToCook"

# (file, part of the line) → why it stays
ALLOWED = {
    ("easy_diffusion/training/checkpoint.py", '": "'): OLD_FILES,
    ("easy_diffusion/training/progress.py", "OLD_COLUMNS = {"): OLD_FILES,
    ("easy_diffusion/train_model.py", "OLD_OPTIONS = {"): OLD_FILES,
    ("easy_diffusion/latent_space.py", "picture_channels"): OLD_FILES,
    ("easy_diffusion/networks/autoencoder.py", "picture_channels"): OLD_FILES,
    ("tests/networks/test_weights_io.py", "picture_channels"): OLD_FILES,
    ("tests/test_old_files.py", '"'): OLD_FILES,
    ("easy_diffusion/dish_classifier.py", "reader_"): OLD_FILES,
    ("datasets/caption_embeddings.py", "states"): "the key of the file format, or hidden states",
    ("benchmarks/autoencoder.py", "reader_accuracy"): CLAIM,
    ("benchmarks/fidelity.py", "reader_accuracy"): CLAIM,
    ("benchmarks/latent.py", "reader_accuracy"): CLAIM,
    ("benchmarks/training.py", "reader_accuracy"): CLAIM,
    ("datasets/__init__.py", "pieces of"): INGREDIENTS,
    ("datasets/dishes.py", "pieces"): INGREDIENTS,
    ("datasets/dish_shapes.py", "piece"): INGREDIENTS,
    ("datasets/dish_rendering.py", "piece"): INGREDIENTS,
    ("datasets/dish_scene.py", "piece"): INGREDIENTS,
    ("datasets/dish_films.py", "piece"): INGREDIENTS,
    ("datasets/beat_films.py", "piece"): INGREDIENTS,
    ("datasets/dish_references.py", "piece"): INGREDIENTS,
    ("tests/datasets/test_dish_references.py", "piece"): INGREDIENTS,
    ("tests/datasets/test_dish_films.py", "piece"): INGREDIENTS,
    ("datasets/dish_scene.py", "computer synthesized pictures"): "the title of a paper",
    ("datasets/aipos.py", "recipe"): HOWTOCOOK,
    ("tests/datasets/test_aipos_lmdb.py", "recipe"): HOWTOCOOK,
    ("datasets/table_lmdb.py", "reader"): "a csv.DictReader",
    ("easy_diffusion/diffusion/guidance.py", "deviation of the cond"): "“standard” is a line above",
    ("easy_diffusion/training/train_autoencoder.py", "deviation 1"): "“standard” is a line above",
    ("tests/evaluation/test_metrics.py", "_states_its_standard_error"): "the verb",
    ("easy_diffusion/app.py", "share=False"): "an option of gradio",
    ("tests/training/test_checkpoint.py", "signal.signal("): "Python's module",
    ("tests/test_package.py", "ast.walk("): "Python's function",
    ("tests/test_package.py", "words"): "words of a docstring",
}


def lines():
    """(file, number, line) of all code, documents, and cells of notebooks."""
    for path in [*FILES, *DOCUMENTS]:
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
            yield path.relative_to(ROOT).as_posix(), number, line
    for path in NOTEBOOKS:
        for number, cell in enumerate(json.loads(path.read_text("utf-8"))["cells"]):
            for line in "".join(cell["source"]).splitlines():
                yield path.relative_to(ROOT).as_posix(), f"cell {number}", line


def allowed(file, line):
    """The entries of ALLOWED that permit a line."""
    return [entry for entry in ALLOWED if file == entry[0] and entry[1] in line]


@pytest.mark.parametrize("pattern", RULES, ids=lambda pattern: RULES[pattern])
def test_no_private_word_is_used(pattern):
    found = [
        f"{file}:{number}: {match[0]!r} → {RULES[pattern]}: {line.strip()}"
        for file, number, line in lines()
        if (match := re.search(pattern, line)) and not allowed(file, line)
    ]
    assert not found, f"{len(found)} lines:\n" + "\n".join(found)


@pytest.mark.parametrize("entry", ALLOWED, ids=lambda entry: entry[0])
def test_each_allowed_use_is_still_there_and_needed(entry):
    matching = [line for file, _, line in lines() if entry in allowed(file, line)]
    assert any(re.search(pattern, line) for line in matching for pattern in RULES), entry


@pytest.mark.parametrize(
    "line",
    ["picture = draw(name)", "def sample_of(x):", "signal, noise = f(t)", "by chance", "the guard"],
)
def test_the_rules_find_what_they_are_for(line):
    assert any(re.search(pattern, line) for pattern in RULES)


@pytest.mark.parametrize(
    "line",
    ["import signal", "os.kill(pid, signal.SIGKILL)", "the standard deviation", "RePaint"],
)
def test_the_rules_leave_ordinary_words_alone(line):
    assert not any(re.search(pattern, line) for pattern in RULES)

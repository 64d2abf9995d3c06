"""Other conditions than captions: sounds of cooking, spoken names, beats, reference images.

The model of this repository keeps its weights; for each condition an encoder is trained for the
same minutes, for beats a model of films. All dishes that are measured have pairs of ingredients
that no training image shows, and sounds and references that were not trained with.

    sound_way_accuracy        the way of cooking is right; the sound alone says it
    spoken_pair_accuracy      ingredients and way are right, from the spoken name, in the voices of
                              the training; the table also has a voice that it never had
    event_f1                  tosses of the generated films against the crackles of their sounds;
                              event_f1_shuffled: against those of another film's sound
    reference_table_accuracy  the table is that of the reference image
    reference_way_accuracy    and so is the vessel, of which the caption says nothing
    reference_dish_accuracy   the ingredients are those of the caption

Synthetic speech is no measure of recognising people. Without the program espeak-ng the spoken names
are left out.
"""

from functools import partial
from pathlib import Path

import torch
from tqdm.auto import tqdm

from datasets.beat_films import BeatFilms
from datasets.dish_references import ReferencedDishes, find_tabletop
from datasets.dish_sounds import Cooking
from datasets.dishes import Dishes, attributes
from datasets.spoken_names import HELD_OUT_VOICE, VOICES, SpokenDishes, has_speech
from easy_diffusion import presets
from easy_diffusion.condition_presets import (
    add_audio_encoder,
    add_beats,
    add_image_prompt,
    hear_names,
    train_condition,
)
from easy_diffusion.evaluation.film_metrics import event_f1, find_tosses
from easy_diffusion.film_presets import BATCH as FILM_BATCH
from easy_diffusion.film_presets import generate_films, inflate_model
from easy_diffusion.generate import generate_images
from easy_diffusion.pretrained import WEIGHTS, load_model

from .fidelity import load_checked_classifier
from .report import finish, make_parser

SIZE = 64
BATCH = 50                              # images that are sampled at once


def sample(model, captions: list, steps: int) -> torch.Tensor:
    """Generate an image for each caption, whatever it is: uint8 [N, 3, SIZE, SIZE]."""
    network, encoder, diffusion, _ = model
    images = []
    for i in tqdm(range(0, len(captions), BATCH), desc="sampling", unit="batch"):
        batch = generate_images(
            network, encoder, diffusion, captions[i:i + BATCH], SIZE, steps, seed=i
        )
        images.append(torch.from_numpy(batch).permute(0, 3, 1, 2))
    return torch.cat(images)


def measure(classifier, images: torch.Tensor, names: list[str]) -> dict:
    """The fractions of images whose ingredients, way of cooking, and both are those of the names.
    """
    found = classifier.classify(images)
    dishes = [attributes(name) for name in names]
    ingredients = [a == frozenset(dish.ingredients) for (a, _), dish in zip(found, dishes)]
    ways = [way == dish.way for (_, way), dish in zip(found, dishes)]
    both = [a and b for a, b in zip(ingredients, ways)]
    return {
        "ingredients": sum(ingredients) / len(names), "way": sum(ways) / len(names),
        "both": sum(both) / len(names),
    }


def measure_beats(model, films: BeatFilms, steps: int) -> tuple[float, float]:
    """The F1 of the tosses of generated films: against their own sounds, and another one's."""
    captions = [films[i][1] for i in range(len(films))]
    tosses = torch.stack([torch.from_numpy(films.draw(i)[1].is_tossed) for i in range(len(films))])
    found = []
    for i in tqdm(range(0, len(captions), FILM_BATCH), desc="sampling films", unit="batch"):
        batch = generate_films(
            model, captions[i:i + FILM_BATCH], size=SIZE, steps=steps, seed=i
        )
        found.append(find_tosses(torch.from_numpy(batch).permute(0, 1, 4, 2, 3)))
    found = torch.cat(found)
    return event_f1(found, tosses), event_f1(found, tosses.roll(1, dims=0))


# ------------------------------------------------------------------ the command


def main():
    options = make_parser(
        "conditions", __doc__, out=Path("out"), minutes=2.0 if torch.cuda.is_available() else 8.0
    ).parse_args()
    quick = options.quick
    out = options.out / "quick" if quick else options.out
    out.mkdir(parents=True, exist_ok=True)
    count, steps = (4, 2) if quick else (100, 25)
    minutes = 0.03 if quick else options.minutes

    # What is measured, and what measures
    classifier, _ = load_checked_classifier(SIZE, out, quick, 4 * count)
    held_out = Dishes(count, SIZE, "held_out", seed=500)
    names = [held_out.choose(i)[0] for i in range(count)]
    store = presets.prepare_dishes(out / f"dishes_{SIZE}", 40 if quick else presets.DISHES, SIZE)
    batch = 4 if quick else None
    rows = []

    def load():
        torch.manual_seed(0)
        return load_model(WEIGHTS, SIZE)

    def add_row(condition: str, model, dataset) -> dict:
        captions = [dataset[i][1] for i in range(count)]
        images = sample(model, captions, steps)
        rows.append({"condition": condition} | measure(classifier, images, names))
        print(rows[-1], flush=True)
        return rows[-1] | {"images": images}

    # The caption, for comparison
    add_row("caption", load(), [(None, name) for name in names])

    # Sounds of cooking
    model = add_audio_encoder(load())
    train_condition(model, Cooking(store), minutes, batch, out / "conditions_sound.safetensors")
    cooking = add_row("sound, ingredients", model, Cooking(held_out, seed=9))
    claims = {"sound_way_accuracy": cooking["way"]}

    # Reference images
    model = add_image_prompt(load())
    references = ReferencedDishes(40 if quick else presets.DISHES, SIZE)
    train_condition(
        model, references, minutes, batch, out / "conditions_reference.safetensors"
    )
    tests = ReferencedDishes(count, SIZE, "held_out", seed=500)
    referenced = add_row("reference image, ingredients", model, tests)
    tables = [
        find_tabletop(image.numpy()) == find_tabletop(tests[i][1][0].numpy())
        for i, image in enumerate(referenced["images"])
    ]
    claims |= {
        "reference_table_accuracy": sum(tables) / count,
        "reference_way_accuracy": referenced["way"],
        "reference_dish_accuracy": referenced["ingredients"],
    }

    # Spoken names
    if has_speech():
        model = hear_names(load())
        train_condition(
            model, SpokenDishes(store), minutes, batch, out / "conditions_spoken.safetensors"
        )
        speak = partial(SpokenDishes, held_out)
        spoken = add_row("spoken name", model, speak(VOICES))
        claims["spoken_pair_accuracy"] = spoken["both"]
        add_row("spoken name, a new voice", model, speak((HELD_OUT_VOICE,)))
    else:
        print("espeak-ng is not installed: no spoken names")

    # Beats
    model = add_beats(inflate_model(load()))
    train_condition(
        model, BeatFilms(40 if quick else 3000, SIZE), minutes, 2 if quick else FILM_BATCH,
        out / "conditions_beats.safetensors",
    )
    f1, shuffled = measure_beats(model, BeatFilms(count, SIZE, "held_out", seed=500), steps)
    claims |= {"event_f1": f1, "event_f1_shuffled": shuffled}
    finish("conditions", claims, rows, quick)


if __name__ == "__main__":
    main()

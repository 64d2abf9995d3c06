"""Datasets of image–caption pairs: item i is (image uint8 [3, H, W], caption str).

The files, in reading order:

    dishes.py              Dishes: synthetic images of dishes with Chinese names, drawn on demand
    dish_shapes.py         the shapes of the ingredients of a drawn dish
    dish_scene.py          a drawn dish as a list of what is where; composited and shaded
    dish_rendering.py      the sprites of a drawn dish: pieces of ingredients, vessels, tabletops
    dish_controls.py       control images for a ControlNet: parts, height, edges, a sketch
    dish_films.py          DishFilms: films of drawn dishes, whose motion is known
    dish_sounds.py         Cooking: drawn dishes with the sounds of their cooking
    beat_films.py          BeatFilms: films of dishes that are tossed to a sound
    spoken_names.py        SpokenDishes: spoken names of dishes, by espeak-ng
    dish_references.py     ReferencedDishes: another dish on the same table, as a reference image
    aipos.py               AiposFood: a folder of food photographs, one subfolder per dish name
    lmdb_environment.py    opens and writes an LMDB file, safely from several processes
    lmdb_store.py          ImageCaptionStore: image–caption records in an LMDB file, a "store"
    aipos_lmdb.py          writes a folder of photographs into a store
    photo_views.py         PhotoViews: several crops of each photograph, and their store
    table_lmdb.py          writes a table of images and captions into a store
    pokemon_lmdb.py        PokemonLmdb: such a store of captioned Pokémon images
    caption_embeddings.py  adds the token embeddings of a frozen text encoder to a store
    latents_lmdb.py        encodes the images of a store with an autoencoder, once

Each file copies out with the siblings that its docstring names. The names below need torch, numpy,
Pillow and tqdm. spoken_names.py also needs soundfile and soxr, and the files on LMDB stores lmdb;
import from these files directly, for example `from datasets.lmdb_store import ImageCaptionStore`.
"""

from .aipos import AiposFood
from .beat_films import BeatFilms
from .dish_controls import ControlledDishes
from .dish_films import MOTIONS, DishFilms, draw_film
from .dish_references import ReferencedDishes
from .dish_shapes import INGREDIENTS
from .dish_sounds import Cooking, cook_sound
from .dishes import HELD_OUT_PAIRS, WAYS, Attributes, Dishes, attributes, dish_names, draw_dish

__all__ = [
    "HELD_OUT_PAIRS",
    "INGREDIENTS",
    "MOTIONS",
    "WAYS",
    "AiposFood",
    "Attributes",
    "BeatFilms",
    "ControlledDishes",
    "Cooking",
    "DishFilms",
    "Dishes",
    "ReferencedDishes",
    "attributes",
    "cook_sound",
    "dish_names",
    "draw_dish",
    "draw_film",
]

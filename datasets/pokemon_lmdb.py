"""PokemonLmdb: a dataset of Pokémon images with Chinese captions, in an LMDB store.

The Pokémon caption datasets are published as .parquet files with the columns `image, text` or
`image, en_text, zh_text`. table_lmdb.py writes them, and any other table, into a store:

    python -m datasets.pokemon_lmdb pokemon.parquet STORE --caption zh_text

The file needs lmdb, Pillow, numpy, torch, tqdm and, for .parquet, pyarrow; beside it, aipos.py,
aipos_lmdb.py, lmdb_environment.py, lmdb_store.py and table_lmdb.py.

>>> import tempfile
>>> from PIL import Image
>>> folder = tempfile.mkdtemp()
>>> Image.new("RGB", (40, 40), "yellow").save(folder + "/25.png")
>>> with open(folder + "/table.csv", "w", encoding="utf-8") as table:
...     _ = table.write("file_name,zh_text\\n25.png,黄色的电老鼠\\n")
>>> _ = build_store(folder + "/table.csv", folder + "/store", 32, "zh_text", show_progress=False)
>>> image, caption = PokemonLmdb(folder + "/store")[0]
>>> tuple(image.shape), caption
((3, 32, 32), '黄色的电老鼠')
"""

import sys

from .aipos_lmdb import AiposFoodLmdb
from .table_lmdb import build_store, main

__all__ = ["PokemonLmdb", "build_store"]

# Both kinds of store have the same layout, so one class reads both.
PokemonLmdb = AiposFoodLmdb

if __name__ == "__main__":
    sys.exit(main())

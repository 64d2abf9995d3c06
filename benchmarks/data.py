"""How fast pictures come: python -m benchmarks.data [--quick]

Batches of 64 pictures of 64×64 from stores of a thousand, a hundred thousand and a million records, in random order, on one core and with
two workers; beside them torchvision's ImageFolder on a folder of JPEGs, of 256×256 as photographs come and of 64×64 as they might have
been prepared. The pictures are drawn dishes; large stores repeat them. A page of a file costs a process most when it first looks at it;
so a store is measured in the first epoch, and once more when each record has been read before, as in all later epochs (epoch 2). A thousand
records are read twenty times in what is called their first epoch; only of large stores does it show what first looks cost. Memory is the
most that a worker had: what it has written for itself alone (private), and all that it sees (resident), shared libraries and pages of the
store included.
"""

import argparse
import itertools
import os
import shutil
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.transforms import Compose, PILToTensor, Resize
from tqdm.auto import tqdm

from datasets.dishes import Dishes
from datasets.lmdb_store import ImageCaptionStore, append_records

from .report import finish

BATCH, SIDE = 64, 64


class Watched(torch.utils.data.Dataset):
    """A dataset whose items bring along what memory their process has, in MB: (picture, (private, resident))."""

    def __init__(self, dataset):
        self.dataset, self.seen = dataset, 0

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        self.seen += 1
        return self.dataset[index][0], memory() if self.seen % 200 == 0 else (0.0, 0.0)


def memory() -> tuple[float, float]:
    """MB of this process: private and resident; zeros where the system does not tell."""
    try:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0, 0.0
    sizes = {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines[1:]}
    return sizes["Private_Dirty"], sizes["Rss"]


def fill(folder, records, side) -> None:
    """A store of so many records: drawn dishes, a thousand of them again and again."""
    drawn = Dishes(1000, side)
    dishes = [drawn[i] for i in range(1000)]
    written = append_records(folder, itertools.islice(itertools.cycle(dishes), records), per_transaction=4096)
    for _ in tqdm(written, total=records, desc=f"{records:,} records", unit="picture"):
        pass
    os.sync()                                                               # else reading would compete with what is still being written


def draw_folder(folder, pictures, side) -> None:
    """JPEGs of drawn dishes, a folder for each dish, as ImageFolder wants them."""
    dishes = Dishes(pictures, side)
    for i in tqdm(range(pictures), desc=f"JPEGs of {side}×{side}", unit="picture"):
        picture, name = dishes[i]
        (folder / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / name / f"{i}.jpg", quality=92)


def measure(name, dataset, workers, pictures, epoch=1) -> dict:
    """Pictures a second over `pictures` of them in random order, after a batch to begin with; then, since looking takes time, a worker's
    memory over a quarter more. epoch: in the second all records have been read by this process before."""
    torch.manual_seed(0)
    if epoch == 2:
        for i in range(len(dataset)):
            dataset[i]

    def batches(dataset, pictures):
        order = torch.utils.data.RandomSampler(dataset, replacement=True, num_samples=pictures + BATCH)
        walk = iter(torch.utils.data.DataLoader(dataset, BATCH, sampler=order, num_workers=workers))
        next(walk)
        return walk

    walk, start = batches(dataset, pictures), time.perf_counter()
    for _ in walk:
        pass
    rate, private, resident = pictures / (time.perf_counter() - start), 0.0, 0.0
    for _, (own, seen) in batches(Watched(dataset), pictures // 4):
        private, resident = max(private, float(own.max())), max(resident, float(seen.max()))
    return {"source": name, "records": len(dataset), "workers": workers, "epoch": epoch, "pictures/s": rate, "private MB": private,
            "resident MB": resident}


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small stores and few pictures; the figures are not kept")
    options = parser.parse_args()
    out = Path(tempfile.mkdtemp(prefix="benchmark_data_", dir="."))         # removed at the end
    sizes, pictures, files = ((200, 400), 256, 100) if options.quick else ((1000, 100_000, 1_000_000), 20_480, 1000)
    rows = []
    try:
        for side in (256, SIDE):
            draw_folder(out / f"jpeg_{side}", files, side)
            form = Compose(([Resize(SIDE)] if side != SIDE else []) + [PILToTensor()])
            for workers in (0, 2):
                folder = ImageFolder(out / f"jpeg_{side}", form)
                rows.append(measure(f"ImageFolder, {side}×{side} JPEG", folder, workers, pictures // 4))
        for records in sizes:
            fill(out / f"store_{records}", records, SIDE)
            store = ImageCaptionStore(out / f"store_{records}")
            rows += [measure("store", store, workers, pictures, epoch) for workers, epoch in ((0, 1), (0, 2), (2, 1))]
    finally:
        shutil.rmtree(out, ignore_errors=True)
    speed = {(row["source"], row["records"], row["workers"], row["epoch"]): row["pictures/s"] for row in rows}
    finish("data", {
        "speedup_over_folder": speed["store", sizes[0], 0, 1] / speed["ImageFolder, 256×256 JPEG", files, 0, 1],
        "speedup_over_folder_of_small_pictures": speed["store", sizes[0], 0, 1] / speed["ImageFolder, 64×64 JPEG", files, 0, 1],
        "million_over_thousand": speed["store", sizes[-1], 0, 2] / speed["store", sizes[0], 0, 2],
        "million_over_thousand_first_epoch": speed["store", sizes[-1], 0, 1] / speed["store", sizes[0], 0, 1],
        "worker_mb": max(row["private MB"] for row in rows if row["source"] == "store" and row["workers"])}, rows, options.quick)


if __name__ == "__main__":
    main()

"""Loading speed of LMDB stores and of image folders: python -m benchmarks.data [--quick]

Batches of 64 images of 64×64 pixels are read in random order from stores of a thousand, a hundred
thousand and a million records, in the main process and with two workers. Compared is torchvision's
ImageFolder on a folder of JPEG files, of 256×256 pixels like photographs, which are resized, and of
64×64, which are not. The images are drawn dishes; large stores repeat them.

The operating system maps a page of the file into a process when the page is first accessed, which
takes time. Therefore a store is measured in its first epoch, and again when every record has been
read before, as in all later epochs (epoch 2). In the first epoch of the store of a thousand records
each record is read twenty times, so only the large stores show the cost of first accesses.

Memory is the maximum of a worker: private memory, which it alone has written, and resident memory,
which also contains shared libraries and pages of the store.
"""

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

from .report import finish, make_parser

BATCH = 64
SIDE = 64


class MemoryMeter(torch.utils.data.Dataset):
    """A dataset whose items also contain the memory of the process that loads them.

    An item is (image, (private, resident)) in MB. Measuring takes time; it is done for every 200th
    item, and the others have zeros.
    """

    def __init__(self, dataset):
        self.dataset = dataset
        self.count = 0

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        self.count += 1
        memory = measure_memory() if self.count % 200 == 0 else (0.0, 0.0)
        return self.dataset[index][0], memory


def measure_memory() -> tuple[float, float]:
    """Return the (private, resident) memory of this process in MB; zeros if it is not Linux."""
    try:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0, 0.0
    megabytes = {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines[1:]}
    return megabytes["Private_Dirty"], megabytes["Rss"]


def write_store(folder: Path, records: int, side: int) -> None:
    """Write a store with this number of records, which repeat a thousand drawn dishes."""
    dataset = Dishes(1000, side)
    dishes = [dataset[i] for i in range(1000)]
    repeated = itertools.islice(itertools.cycle(dishes), records)
    written = append_records(folder, repeated, per_transaction=4096)
    for _ in tqdm(written, total=records, desc=f"{records:,} records", unit="image"):
        pass
    os.sync()       # so that writing does not slow down the reading that is measured next


def write_jpeg_folder(folder: Path, images: int, side: int) -> None:
    """Write JPEG files of drawn dishes, one folder per name, as ImageFolder expects."""
    dishes = Dishes(images, side)
    for i in tqdm(range(images), desc=f"JPEGs of {side}×{side}", unit="image"):
        image, name = dishes[i]
        (folder / name).mkdir(parents=True, exist_ok=True)
        pixels = image.permute(1, 2, 0).numpy()     # [H, W, 3]
        Image.fromarray(pixels).save(folder / name / f"{i}.jpg", quality=92)


def start_loader(dataset, images: int, workers: int):
    """Return an iterator over random batches with `images` images; a first batch is discarded."""
    sampler = torch.utils.data.RandomSampler(
        dataset, replacement=True, num_samples=images + BATCH
    )
    loader = torch.utils.data.DataLoader(dataset, BATCH, sampler=sampler, num_workers=workers)
    batches = iter(loader)
    next(batches)
    return batches


def measure(source: str, dataset, workers: int, images: int, epoch: int = 1) -> dict:
    """Return a row with the loading speed over `images` images and the memory of a worker.

    epoch: 2 reads all records once before the measurement. The memory is measured separately,
    over a quarter of the images, because measuring it takes time.
    """
    torch.manual_seed(0)
    if epoch == 2:
        for i in range(len(dataset)):
            dataset[i]

    batches = start_loader(dataset, images, workers)
    start = time.perf_counter()
    for _ in batches:
        pass
    images_per_second = images / (time.perf_counter() - start)

    private = 0.0
    resident = 0.0
    for _, (batch_private, batch_resident) in start_loader(
        MemoryMeter(dataset), images // 4, workers
    ):
        private = max(private, float(batch_private.max()))
        resident = max(resident, float(batch_resident.max()))
    return {
        "source": source,
        "records": len(dataset),
        "workers": workers,
        "epoch": epoch,
        "images/s": images_per_second,
        "private MB": private,
        "resident MB": resident,
    }


def measure_folders(out: Path, files: int, images: int) -> list[dict]:
    """Return the rows of ImageFolder."""
    rows = []
    for side in (256, SIDE):
        write_jpeg_folder(out / f"jpeg_{side}", files, side)
        transforms = [PILToTensor()] if side == SIDE else [Resize(SIDE), PILToTensor()]
        for workers in (0, 2):
            folder = ImageFolder(out / f"jpeg_{side}", Compose(transforms))
            rows.append(measure(f"ImageFolder, {side}×{side} JPEG", folder, workers, images))
    return rows


def measure_stores(out: Path, sizes: tuple, images: int) -> list[dict]:
    """Return the rows of stores with these numbers of records."""
    rows = []
    for records in sizes:
        write_store(out / f"store_{records}", records, SIDE)
        store = ImageCaptionStore(out / f"store_{records}")
        for workers, epoch in ((0, 1), (0, 2), (2, 1)):
            rows.append(measure("store", store, workers, images, epoch))
    return rows


def main():
    quick = make_parser("data", __doc__).parse_args().quick
    sizes = (200, 400) if quick else (1000, 100_000, 1_000_000)
    images = 256 if quick else 20_480
    files = 100 if quick else 1000

    out = Path(tempfile.mkdtemp(prefix="benchmark_data_", dir="."))
    try:
        rows = measure_folders(out, files, images // 4)
        rows += measure_stores(out, sizes, images)
    finally:
        shutil.rmtree(out, ignore_errors=True)

    speed = {}
    for row in rows:
        key = row["source"], row["records"], row["workers"], row["epoch"]
        speed[key] = row["images/s"]
    folder_speed = speed["ImageFolder, 256×256 JPEG", files, 0, 1]
    small_folder_speed = speed["ImageFolder, 64×64 JPEG", files, 0, 1]
    worker_rows = [row for row in rows if row["source"] == "store" and row["workers"] > 0]
    smallest = sizes[0]
    largest = sizes[-1]
    claims = {
        "speedup_over_folder": speed["store", smallest, 0, 1] / folder_speed,
        "speedup_over_folder_of_small_images":
            speed["store", smallest, 0, 1] / small_folder_speed,
        "million_over_thousand":
            speed["store", largest, 0, 2] / speed["store", smallest, 0, 2],
        "million_over_thousand_first_epoch":
            speed["store", largest, 0, 1] / speed["store", smallest, 0, 1],
        "worker_mb": max(row["private MB"] for row in worker_rows),
    }
    finish("data", claims, rows, quick)


if __name__ == "__main__":
    main()

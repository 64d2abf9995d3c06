"""Train a network on any of the datasets, by one command: python -m easy_diffusion.train_dishes --minutes 10

Without --data it draws dishes with Chinese names; --data takes a folder of photographs (a folder for each name), a store that
`python -m datasets.aipos_lmdb` or `pokemon_lmdb` has written, or one of latents, with --autoencoder to look at them. Without a network's
options it is, for pictures, the demo's. Several GPUs, machines, or processes of a CPU:

    accelerate launch --multi_gpu -m easy_diffusion.train_dishes --batch-size 32
    ACCELERATE_USE_CPU=true torchrun --standalone --nproc_per_node 2 -m easy_diffusion.train_dishes           # without a GPU

Each process then takes --batch-size pictures a step. Any UNet can be had: that of this project's first version, which has 93 M weights, is

    --channels 128 128 128 256 256 512 512 --attention 2 3 4 --blocks 1 --heads 4 --words 768 --no-pooled --patch 1 --size 128

The same command with --draw and names draws those by what has been learned. Into --out the command writes

    run.json               of what kind it is, so that nothing of another kind goes on from it
    model.safetensors      all that the run must remember: killed, it goes on; .1, .2 are those before, .best that of the lowest loss
    log.csv                the loss (and that of each quarter of the schedule), the rates, the speed; pandas reads it
    log.png                its curves, with a line where SGD took over
    drawn.png              what --draw has drawn
    samples.png            what the network draws of names it was trained on and, of drawn dishes, of names it was not
    board/                 for TensorBoard, with --tensorboard

This file is a roof like demo.py: it imports from everywhere, and nothing imports it but notebooks and benchmarks.

>>> options = parsed(["--channels", "32", "64", "--minutes", "3"])
>>> options.channels, options.minutes, options.batch_size
([32, 64], 3.0, 32)
"""

import argparse
import contextlib
import copy
import json
import os
import random
import sys
import warnings
from pathlib import Path

import torch
from accelerate import Accelerator

from datasets import lmdb_store
from datasets.aipos import AiposFood
from datasets.aipos_lmdb import AiposFoodLmdb
from datasets.caption_states import StoredStates, write_states
from datasets.dish_shapes import INGREDIENTS
from datasets.dishes import WAYS, attributes, dish_names
from datasets.latents_lmdb import LatentLmdb

from . import checkpoint as files
from . import recipe
from .animate import contact_sheet, write_atomically, write_png
from .batches import batches, chance
from .diffusion import GaussianDiffusion, ImportanceTimesteps, logit_normal_timesteps, min_snr_weight, velocity_weight
from .flow_matching import RectifiedFlow, logit_normal_time
from .guard import in_one_go, largest_batch
from .latent import fingerprint, load_autoencoder
from .metrics import Reader, share
from .run import anywhere, fast_precision
from .schedule import NoiseSchedule
from .score_sde import uniform_time
from .text import CharacterEncoder, CnClipEncoder
from .train import stopped_falling, train, uniform_timesteps
from .unet import UNet
from .watch import watched

TIMESTEPS = {"logit-normal": lambda steps: logit_normal_timesteps, "uniform": lambda steps: uniform_timesteps,
             "importance": ImportanceTimesteps}
TIMES_OF_A_FLOW = {"logit-normal": logit_normal_time, "uniform": uniform_time}
WEIGHTS = {"velocity": velocity_weight, "min-snr": min_snr_weight, "none": None}
MINUTES = 2.5 if torch.cuda.is_available() else 10.0


def pictures_a_step(text: str) -> int | str:
    """A batch's size, or "auto"."""
    if text != "auto" and int(text) < 1:
        raise ValueError
    return text if text == "auto" else int(text)


def parsed(arguments=None) -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(prog="python -m easy_diffusion.train_dishes", description=__doc__.split("\n>>>")[0],
                                     formatter_class=type("Help", (argparse.ArgumentDefaultsHelpFormatter,
                                                                   argparse.RawDescriptionHelpFormatter), {}))

    def add(name, kind, default, help, **more):
        parser.add_argument(name, type=kind, default=default, help=help, **more)

    def flag(name, help, default=False):
        parser.add_argument(name, action=argparse.BooleanOptionalAction, default=default, help=help)

    add("--data", Path, None, "a folder of photographs, a store, or a store of latents; without it dishes are drawn")
    add("--autoencoder", Path, None, "of latents: the file that encoded them, to decode what is drawn")
    add("--dishes", int, recipe.DISHES, "how many are drawn, where there is no --data")
    add("--size", int, recipe.SIZE, "side of drawn dishes and of photographs in pixels")
    add("--out", Path, Path("out/train"), "the folder for all that is written")
    add("--cn-clip", str, None, "a checkpoint of Chinese CLIP, which then reads the store's captions in place of an encoder that learns")

    add("--channels", int, [64, 128], "of each level of the network", nargs="+")
    add("--attention", int, [1], "the levels that have attention, counted from 0, the finest", nargs="*")
    add("--blocks", int, 2, "residual blocks of each level")
    add("--heads", int, 2, "of attention")
    add("--patch", int, 0, "side of the squares of pixels that the network takes as one place; 0: 4 for pictures, 1 for latents")
    add("--words", int, 128, "dimension of the encoder that learns")
    add("--dropout", float, 0.0, "share of the numbers inside a residual block that are left out in training")
    flag("--pooled", "the mean of the words joins the time", default=True)
    flag("--checkpointing", "compute blocks a second time instead of keeping what they saw: two fifths of the memory, a fifth more time")

    add("--schedule", str, "cosine", "of the noise", choices=("cosine", "linear", "quad", "jsd", "sigmoid"))
    add("--predicts", str, "x0", "what the network is asked for; velocity: rectified flow's, which has no schedule, variance or weight",
        choices=("x0", "v", "noise", "velocity"))
    add("--variance", str, "fixed_small", "of a step back; learned_range: the network answers with it, too, and learns it from the bound",
        choices=("fixed_small", "fixed_large", "learned_range"))
    add("--weight", str, "auto", "of the loss at each timestep; auto: velocity, but none for noise", choices=("auto", *WEIGHTS))
    add("--timesteps", str, "logit-normal", "how they are drawn in training", choices=tuple(TIMESTEPS))
    add("--caption-dropout", float, 0.1, "share of captions that become empty")

    add("--minutes", float, None, f"of training; without it {MINUTES:g}, or, if --steps are given, as many as they take")
    add("--steps", int, 10 ** 7, "of training, at most")
    add("--batch-size", pictures_a_step, recipe.BATCH, "pictures of a step in each process; auto: as "
        "many as fit into memory, at most 1024")
    add("--pieces", int, 1, "parts of a batch that go through the network one after the other")
    add("--workers", int, -1, "processes that read pictures; -1: none on a CPU, four with a GPU")
    add("--learning-rate", float, 2e-3, "of AdamW")
    add("--muon-learning-rate", float, 3e-3, "of Muon, for matrices; 0: AdamW trains them, too, and wants a smaller rate, such as 1e-4")
    add("--sgd-learning-rate", float, 1e-6, "of SGD")
    add("--phase", str, "adamw", "with what to begin", choices=("adamw", "sgd"))
    flag("--sgd", "let SGD take over when the loss has stopped falling", default=True)
    add("--window", int, 2000, "steps whose mean loss must be below that of as many before, by a standard error; else it no longer falls")
    add("--warmup", int, 100, "steps over which the rate rises")
    add("--decay", float, 0.5, "share of the run over which the rate falls to zero; if more steps are asked for later, it rises again")
    add("--weight-decay", float, 0.01, "of AdamW and Muon")
    add("--ema", float, 0.998, "of the moving average")
    add("--clip", float, 1.0, "length to which the gradient is cut")
    add("--patience", int, 5, "steps in a row that may be skipped before the average of a while ago comes back")
    add("--spike", float, 20.0, "how far above the last losses, in their deviations, a loss is a spike; inf: never")
    add("--precision", str, fast_precision(), "of the network's arithmetic", choices=("no", "bf16", "fp16"))
    flag("--compile", "torch.compile the network")
    add("--seed", int, 0, "of the weights, the order and all chance")

    add("--keep", int, 3, "checkpoints that stay; from 2 on also the best")
    add("--save-seconds", float, 60.0, "between two checkpoints")
    add("--every", int, 10, "steps between two rows of the log")
    flag("--tensorboard", "write the log for TensorBoard, too")
    add("--look-minutes", float, 2.0, "of training between two looks at samples and curves; 0: curves alone, at the end")
    add("--guidance", float, 2.0, "of the samples")
    add("--reader", Path, None, "a reader's file, such as benchmarks.fidelity leaves, that counts how many drawn dishes are right")
    add("--draw", str, None, "names: do not train, but draw these", nargs="+")
    options = parser.parse_args(arguments)
    if options.minutes is None:
        options.minutes = MINUTES if options.steps == parser.get_default("steps") else 0
    if options.weight == "auto":
        options.weight = "none" if options.predicts == "noise" else "velocity"
    if options.tensorboard:
        try:
            import tensorboard  # noqa: F401
        except ImportError:
            parser.error("--tensorboard needs the library: pip install tensorboard; log.csv has the same numbers without it")
    for name in ("pieces", "every", "keep", "blocks", "heads", "dishes", "size", "steps"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is 1 or more, not {getattr(options, name)}")
    if options.learning_rate <= 0 or options.sgd_learning_rate <= 0 or options.muon_learning_rate < 0 or options.minutes < 0:
        parser.error("learning rates and minutes are not negative, and AdamW's and SGD's rates not zero")
    if beyond := [level for level in options.attention if not 0 <= level < len(options.channels)]:
        parser.error(f"--attention {beyond[0]}: the levels of --channels are 0 to {len(options.channels) - 1}")
    if options.predicts == "velocity" and (options.timesteps == "importance" or options.variance == "learned_range"):
        parser.error("--predicts velocity has no --timesteps importance and no --variance learned_range")
    if options.cn_clip and not options.data:
        parser.error("--cn-clip keeps its states in a store: give one with --data")
    return options


def dataset_of(options, accelerator):
    """(dataset, its captions, names to look at, autoencoder or None) of --data; dishes are drawn by the first process alone."""
    with first_alone(accelerator):
        if options.data is None:
            data = recipe.prepare(options.out / f"dishes_{options.size}", options.dishes, options.size)
            names = random.Random(0).sample(dish_names("train"), 6) + random.Random(0).sample(dish_names("held_out"), 6)
            return data, dish_names("train") + names, names, None
        autoencoder = load_autoencoder(options.autoencoder) if options.autoencoder else None
        if not (options.data / "data.mdb").exists():
            data = AiposFood(options.data, options.size)
            captions = data.captions
        elif lmdb_store.about_of(options.data) and b"latents" in lmdb_store.about_of(options.data):
            data = LatentLmdb(options.data, fingerprint(autoencoder) if autoencoder else None)
            captions = [data[i][1] for i in range(len(data))]
        else:
            data = AiposFoodLmdb(options.data)
            captions = list(lmdb_store.captions(options.data))
    captions = list(dict.fromkeys(captions))
    return data, captions, random.Random(0).sample(captions, min(12, len(captions))), autoencoder


@contextlib.contextmanager
def first_alone(accelerator):
    """The first process goes first, then the first of each other machine, which may have another disk, then all."""
    with accelerator.main_process_first(), accelerator.local_main_process_first():
        yield


def encoder_of(options, captions, accelerator):
    """Who reads the captions: an encoder that learns, or what Chinese CLIP said of each, kept in the store."""
    if not options.cn_clip:
        longest = max(32, 1 + max(len(caption) for caption in captions))
        return CharacterEncoder("".join(captions), dim=options.words, layers=2, max_length=longest)
    with first_alone(accelerator):                                          # who may have to fetch it
        reader = CnClipEncoder(options.cn_clip)
        for _ in write_states(options.data, reader, reader.fingerprint()):
            pass
    return StoredStates(options.data, reader.fingerprint())


def parts(options, shape, encoder):
    """Network, diffusion and timesteps to train at, for pictures, or latents, of this shape [C, H, W]."""
    levels = range(len(options.channels))
    answers = shape[0] * (2 if options.variance == "learned_range" else 1)
    network = UNet(shape[0], answers, channels=tuple(options.channels), attention=tuple(level in options.attention for level in levels),
                   blocks=options.blocks, heads=options.heads, patch=options.patch or 4,
                   context_dim=encoder.dim, pooled=options.pooled, dropout=options.dropout, checkpointing=options.checkpointing)
    if options.predicts == "velocity":
        return network, RectifiedFlow(), TIMES_OF_A_FLOW[options.timesteps]
    schedule = getattr(NoiseSchedule, options.schedule)(1000)
    diffusion = GaussianDiffusion(schedule, options.predicts, options.variance, WEIGHTS[options.weight])
    return network, diffusion, TIMESTEPS[options.timesteps](len(diffusion))


def looking(options, diffusion, names, size, autoencoder):
    """A function step → {"fidelity": ...} that draws these names into samples.png; the share is that of drawings read right, if there is a
    reader. Of latents without their autoencoder nothing can be seen."""
    reader, wanted = None, []
    if options.reader is not None:
        reader, wanted = Reader(INGREDIENTS, WAYS), [attributes(name) for name in names]
        files.load_into(reader, files.load(options.reader))

    def look(step):
        pictures = draw("samples.png", options, step.network, step.encoder, diffusion, names, size, autoencoder)
        if reader is None:
            return {}
        device = next(step.network.parameters()).device
        right = reader.to(device).fully_right(torch.from_numpy(pictures).permute(0, 3, 1, 2).to(device), wanted)
        return {"fidelity": share(right)}

    return look


def draw(file, options, network, encoder, diffusion, names, size, autoencoder, bar=False):
    """Draw these names into a file of --out; the pictures, uint8 [B, size, size, 3]."""
    if autoencoder is not None:
        autoencoder.to(next(network.parameters()).device)
    pictures = recipe.sample(network, encoder, diffusion, names, size, guidance=options.guidance, bar=bar, autoencoder=autoencoder)
    write_png(options.out / file, contact_sheet([[picture] for picture in pictures], names, columns=6))
    return pictures


def fitting_batch(options, data, captions, encoder, accelerator) -> int:
    """--batch-size auto: that of the run which goes on, or the largest power of two with which a network like this one has enough memory
    for a training step, in every process."""
    checkpoint = options.out / "model.safetensors"
    if checkpoint.exists():
        return files.load_newest(checkpoint)["pictures"] // accelerator.num_processes
    pictures, longest = data[0][0], max(captions, key=len)

    def step(count):
        encoder_here = copy.deepcopy(encoder)
        network, diffusion, timesteps = parts(options, pictures.shape, encoder_here)
        in_one_go(train(network, diffusion, [(pictures.expand(count, *pictures.shape), [longest] * count)], encoder_here, steps=2,
                        timesteps=timesteps, pieces=options.pieces, muon_learning_rate=options.muon_learning_rate or None,
                        accelerator=accelerator))

    fits = largest_batch(step, agreed=lambda true: not anywhere(accelerator, not true))
    return min(fits, 2 ** ((len(data) // accelerator.num_processes).bit_length() - 1))


def kind_of(options, shape, encoder) -> dict:
    """What two runs must have in common for the weights of one to mean the same in the other."""
    names = ("channels", "attention", "blocks", "heads", "patch", "words", "pooled", "predicts", "variance", "schedule", "weight",
             "timesteps")
    return {name: getattr(options, name) for name in names} | {"shape": list(shape), "characters": getattr(encoder, "characters", None)}


def check_kind(out: Path, kind: dict) -> None:
    """ValueError where a run of another kind is kept in --out."""
    if (out / "run.json").exists():
        before = json.loads((out / "run.json").read_text("utf-8"))
        if others := [name for name in kind if before.get(name) != kind[name]]:
            told = "; ".join(f"{name}: {before.get(name)}, not {kind[name]}" for name in others if name != "characters")
            raise ValueError(f"{out} holds a run of another kind ({told or 'its captions had other characters'}): give the options that it "
                             "was begun with, or another --out")


def never(losses, window) -> bool:
    """For --no-sgd."""
    return False


def main(arguments=None) -> int:
    """Train; see the module's docstring."""
    options = parsed(arguments)
    warnings.formatwarning = lambda message, *_: f"note: {message}\n"
    accelerator = Accelerator(mixed_precision=options.precision)
    if int(os.environ.get("WORLD_SIZE", 1)) > accelerator.num_processes:
        raise SystemExit("several processes were started, but each believes to be alone: without a GPU set ACCELERATE_USE_CPU=true")
    data, captions, names, autoencoder = dataset_of(options, accelerator)
    pictures = data[0][0].dtype == torch.uint8                              # else latents
    options.patch = options.patch or (4 if pictures else 1)
    torch.manual_seed(options.seed)
    encoder = encoder_of(options, captions, accelerator)
    shape = tuple(data[0][0].shape)
    check_kind(options.out, kind := kind_of(options, shape, encoder))
    if options.batch_size == "auto" and not options.draw:
        with chance(options.seed):                                          # afterwards the weights are drawn as if nothing had been tried
            options.batch_size = fitting_batch(options, data, captions, encoder, accelerator)
    network, diffusion, timesteps = parts(options, shape, encoder)
    size = shape[-1] * (autoencoder.factor if autoencoder is not None else 1)
    if options.draw:
        recipe.load_average(network, encoder, files.load_newest(options.out / "model.safetensors")["average"])
        draw("drawn.png", options, network, encoder, diffusion, options.draw, size, autoencoder, bar=True)
        print(options.out / "drawn.png")
        return 0
    loader = batches(data, options.batch_size, None if options.workers < 0 else options.workers, seed=options.seed)
    weights = sum(weight.numel() for weight in network.parameters())
    accelerator.print(f"{len(data)} pictures {list(shape)}, {len(captions)} captions; {weights / 1e6:.1f} M weights; "
                      f"{accelerator.num_processes} × {options.batch_size} pictures a step, {accelerator.device.type}, {options.precision}")
    steps = train(network, diffusion, loader, encoder, steps=options.steps, minutes=options.minutes or None, pieces=options.pieces,
                  learning_rate=options.learning_rate, muon_learning_rate=options.muon_learning_rate or None, window=options.window,
                  sgd_learning_rate=options.sgd_learning_rate, settled=stopped_falling if options.sgd else never, phase=options.phase,
                  warmup=options.warmup, decay=options.decay, weight_decay=options.weight_decay, ema=options.ema,
                  caption_dropout=options.caption_dropout, clip=options.clip, timesteps=timesteps, compile=options.compile,
                  patience=options.patience, spike=options.spike, seed=options.seed, checkpoint=options.out / "model.safetensors",
                  keep=options.keep, save_seconds=options.save_seconds, accelerator=accelerator)
    if accelerator.is_main_process:
        seen = options.look_minutes > 0 and (autoencoder is not None or pictures)
        steps = watched(steps, options.out / "log.csv", options.out / "board" if options.tensorboard else None, options.every,
                        looking(options, diffusion, names, size, autoencoder) if seen else None, options.look_minutes or 1e9,
                        looks=["fidelity"] if options.reader else [])
    try:
        first = next(steps, None)
        if accelerator.is_main_process:
            write_atomically(options.out / "run.json", json.dumps(kind, ensure_ascii=False, indent=1).encode())
        if first is not None and first.index:
            accelerator.print(f"the run goes on after {first.index} steps")
        for _ in steps:
            pass
        if first is None:
            accelerator.print("this run is at its end already: ask for more --minutes or --steps, or begin another with another --out")
    except FloatingPointError as error:
        print(f"given up: {error}", file=sys.stderr)
        return 1
    return 0


def command() -> int:
    """main, for whoever sits at a terminal: a sentence in place of a traceback where what was asked for cannot be."""
    try:
        return main()
    except (ValueError, OSError, MemoryError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from its last checkpoint, if there is one yet", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(command())

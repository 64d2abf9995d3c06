"""Train a network on any of the datasets, by one command: python -m easy_diffusion.train_model --minutes 10

Without --data it draws dishes with Chinese names; --data takes a folder of photographs (a folder for each name), a store that
`python -m datasets.aipos_lmdb` or `pokemon_lmdb` has written, or one of latents, with --autoencoder to look at them. Without a network's
options it is, for pictures, the demo's. Several GPUs, machines, or processes of a CPU:

    accelerate launch --multi_gpu -m easy_diffusion.train_model --batch-size 32
    ACCELERATE_USE_CPU=true torchrun --standalone --nproc_per_node 2 -m easy_diffusion.train_model           # without a GPU

Each process then takes --batch-size pictures a step. Any UNet can be had: that of this project's first version, which has 93 M weights, is

    --channels 128 128 128 256 256 512 512 --attention 2 3 4 --blocks 1 --heads 4 --text-dim 768 --no-pooled --patch 1 --size 128

The same command with --generate and names draws those by what has been learned. Into --out the command writes

    run.json               of what kind it is, so that nothing of another kind goes on from it
    model.safetensors      all that the run must remember: killed, it goes on; .1, .2 are those before, .best that of the lowest loss
    log.csv                the loss (and that of each quarter of the schedule), the rates, the speed; pandas reads it
    log.png                its curves, with a line where SGD took over
    generated.png              what --generate has drawn
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
from datasets.caption_embeddings import StoredCaptionEmbeddings, write_caption_embeddings
from datasets.dish_shapes import INGREDIENTS
from datasets.dishes import WAYS, attributes, dish_names
from datasets.latents_lmdb import LatentLmdb

from .diffusion.flow_matching import RectifiedFlow
from .diffusion.gaussian import GaussianDiffusion, min_snr_weight, velocity_weight
from .diffusion.schedule import NoiseSchedule
from .diffusion.timesteps import ImportanceTimesteps, logit_normal_time, logit_normal_timesteps, uniform_time, uniform_timesteps
from .evaluation.attribute_classifier import AttributeClassifier, prompt_accuracy
from .files import write_atomically
from .generate import generate_images
from .images import contact_sheet, encode_png
from .latent_space import fingerprint
from .networks.text_encoder import CharacterEncoder, CnClipEncoder
from .networks.unet import UNet
from .networks.weights_io import load_autoencoder, load_weights
from .presets import BATCH, DISHES, SIZE, prepare_dishes
from .training.checkpoint import load_checkpoint, load_ema_weights, load_newest_checkpoint
from .training.data_loader import fork_rng, make_loader
from .training.distributed import any_rank, fast_precision
from .training.memory import find_largest_batch, run_unsplit
from .training.optimizers import has_plateaued
from .training.progress import track_progress
from .training.trainer import train

TIMESTEPS = {"logit-normal": lambda steps: logit_normal_timesteps, "uniform": lambda steps: uniform_timesteps,
             "importance": ImportanceTimesteps}
FLOW_TIMES = {"logit-normal": logit_normal_time, "uniform": uniform_time}
LOSS_WEIGHTS = {"velocity": velocity_weight, "min-snr": min_snr_weight, "none": None}
OLD_OPTIONS = {"predicts": "prediction_type", "words": "text_dim", "weight": "loss_weight"}         # in a run.json of an earlier version
MINUTES = 2.5 if torch.cuda.is_available() else 10.0


def parse_batch_size(text: str) -> int | str:
    """A batch's size, or "auto"."""
    if text != "auto" and int(text) < 1:
        raise ValueError
    return text if text == "auto" else int(text)


def parse_options(arguments=None) -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(prog="python -m easy_diffusion.train_model", description=__doc__.split("\n>>>")[0],
                                     formatter_class=type("Help", (argparse.ArgumentDefaultsHelpFormatter,
                                                                   argparse.RawDescriptionHelpFormatter), {}))

    def add(name, kind, default, help, **more):
        parser.add_argument(name, type=kind, default=default, help=help, **more)

    def flag(name, help, default=False):
        parser.add_argument(name, action=argparse.BooleanOptionalAction, default=default, help=help)

    add("--data", Path, None, "a folder of photographs, a store, or a store of latents; without it dishes are drawn")
    add("--autoencoder", Path, None, "of latents: the file that encoded them, to decode what is drawn")
    add("--dishes", int, DISHES, "how many are drawn, where there is no --data")
    add("--size", int, SIZE, "side of drawn dishes and of photographs in pixels")
    add("--out", Path, Path("out/train"), "the folder for all that is written")
    add("--cn-clip", str, None, "a checkpoint of Chinese CLIP, which then reads the store's captions in place of an encoder that learns")

    add("--channels", int, [64, 128], "of each level of the network", nargs="+")
    add("--attention", int, [1], "the levels that have attention, counted from 0, the finest", nargs="*")
    add("--blocks", int, 2, "residual blocks of each level")
    add("--heads", int, 2, "of attention")
    add("--patch", int, 0, "side of the squares of pixels that the network takes as one place; 0: 4 for pictures, 1 for latents")
    add("--text-dim", int, 128, "dimension of the encoder that learns")
    add("--dropout", float, 0.0, "share of the numbers inside a residual block that are left out in training")
    flag("--pooled", "the mean of the words joins the time", default=True)
    flag("--checkpointing", "compute blocks a second time instead of keeping what they saw: two fifths of the memory, a fifth more time")

    add("--schedule", str, "cosine", "of the noise", choices=("cosine", "linear", "quad", "jsd", "sigmoid"))
    add("--prediction-type", str, "x0", "what the network is asked for; velocity: rectified flow's, which has no schedule, variance or weight",
        choices=("x0", "v", "eps", "velocity"))
    add("--variance", str, "fixed_small", "of a step back; learned_range: the network answers with it, too, and learns it from the bound",
        choices=("fixed_small", "fixed_large", "learned_range"))
    add("--loss-weight", str, "auto", "of the loss at each timestep; auto: velocity, but none for noise", choices=("auto", *LOSS_WEIGHTS))
    add("--timesteps", str, "logit-normal", "how they are drawn in training", choices=tuple(TIMESTEPS))
    add("--caption-dropout", float, 0.1, "share of captions that become empty")

    add("--minutes", float, None, f"of training; without it {MINUTES:g}, or, if --steps are given, as many as they take")
    add("--steps", int, 10 ** 7, "of training, at most")
    add("--batch-size", parse_batch_size, BATCH, "pictures of a step in each process; auto: as "
        "many as fit into memory, at most 1024")
    add("--micro-batches", int, 1, "parts of a batch that go through the network one after the other")
    add("--workers", int, -1, "processes that read pictures; -1: none on a CPU, four with a GPU")
    add("--learning-rate", float, 2e-3, "of AdamW")
    add("--muon-learning-rate", float, 3e-3, "of Muon, for matrices; 0: AdamW trains them, too, and wants a smaller rate, such as 1e-4")
    add("--sgd-learning-rate", float, 1e-6, "of SGD")
    add("--phase", str, "adamw", "with what to begin", choices=("adamw", "sgd"))
    flag("--sgd", "let SGD take over when the loss has stopped falling", default=True)
    add("--plateau-window", int, 2000, "steps whose mean loss must be below that of as many before, by a standard error; else it no longer falls")
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
    add("--log-every", int, 10, "steps between two rows of the log")
    flag("--tensorboard", "write the log for TensorBoard, too")
    add("--sample-minutes", float, 2.0, "of training between two looks at samples and curves; 0: curves alone, at the end")
    add("--guidance", float, 2.0, "of the samples")
    add("--classifier", Path, None, "a reader's file, such as benchmarks.fidelity leaves, that counts how many drawn dishes are right")
    add("--generate", str, None, "names: do not train, but draw these", nargs="+")
    options = parser.parse_args(arguments)
    if options.minutes is None:
        options.minutes = MINUTES if options.steps == parser.get_default("steps") else 0
    if options.loss_weight == "auto":
        options.loss_weight = "none" if options.prediction_type == "eps" else "velocity"
    if options.tensorboard:
        try:
            import tensorboard  # noqa: F401
        except ImportError:
            parser.error("--tensorboard needs the library: pip install tensorboard; log.csv has the same numbers without it")
    for name in ("micro_batches", "log_every", "keep", "blocks", "heads", "dishes", "size", "steps"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is 1 or more, not {getattr(options, name)}")
    if options.learning_rate <= 0 or options.sgd_learning_rate <= 0 or options.muon_learning_rate < 0 or options.minutes < 0:
        parser.error("learning rates and minutes are not negative, and AdamW's and SGD's rates not zero")
    if beyond := [level for level in options.attention if not 0 <= level < len(options.channels)]:
        parser.error(f"--attention {beyond[0]}: the levels of --channels are 0 to {len(options.channels) - 1}")
    if options.prediction_type == "velocity" and (options.timesteps == "importance" or options.variance == "learned_range"):
        parser.error("--prediction-type velocity has no --timesteps importance and no --variance learned_range")
    if options.cn_clip and not options.data:
        parser.error("--cn-clip keeps its states in a store: give one with --data")
    return options


def load_dataset(options, accelerator):
    """(dataset, its captions, names to look at, autoencoder or None) of --data; dishes are drawn by the first process alone."""
    with main_process_first(accelerator):
        if options.data is None:
            data = prepare_dishes(options.out / f"dishes_{options.size}", options.dishes, options.size)
            names = random.Random(0).sample(dish_names("train"), 6) + random.Random(0).sample(dish_names("held_out"), 6)
            return data, dish_names("train") + names, names, None
        autoencoder = load_autoencoder(options.autoencoder) if options.autoencoder else None
        if not (options.data / "data.mdb").exists():
            data = AiposFood(options.data, options.size)
            captions = data.captions
        elif lmdb_store.read_metadata(options.data) and b"latents" in lmdb_store.read_metadata(options.data):
            data = LatentLmdb(options.data, fingerprint(autoencoder) if autoencoder else None)
            captions = [data[i][1] for i in range(len(data))]
        else:
            data = AiposFoodLmdb(options.data)
            captions = list(lmdb_store.read_captions(options.data))
    captions = list(dict.fromkeys(captions))
    return data, captions, random.Random(0).sample(captions, min(12, len(captions))), autoencoder


@contextlib.contextmanager
def main_process_first(accelerator):
    """The first process goes first, then the first of each other machine, which may have another disk, then all."""
    with accelerator.main_process_first(), accelerator.local_main_process_first():
        yield


def build_encoder(options, captions, accelerator):
    """Who reads the captions: an encoder that learns, or what Chinese CLIP said of each, kept in the store."""
    if not options.cn_clip:
        longest = max(32, 1 + max(len(caption) for caption in captions))
        return CharacterEncoder("".join(captions), dim=options.text_dim, layers=2, max_length=longest)
    with main_process_first(accelerator):                                          # who may have to fetch it
        reader = CnClipEncoder(options.cn_clip)
        for _ in write_caption_embeddings(options.data, reader, reader.fingerprint()):
            pass
    return StoredCaptionEmbeddings(options.data, reader.fingerprint())


def build_network(options, shape, encoder):
    """Network, diffusion and timesteps to train at, for pictures, or latents, of this shape [C, H, W]."""
    levels = range(len(options.channels))
    answers = shape[0] * (2 if options.variance == "learned_range" else 1)
    network = UNet(shape[0], answers, channels=tuple(options.channels), attention=tuple(level in options.attention for level in levels),
                   blocks=options.blocks, heads=options.heads, patch=options.patch or 4,
                   context_dim=encoder.dim, pooled=options.pooled, dropout=options.dropout, checkpointing=options.checkpointing)
    if options.prediction_type == "velocity":
        return network, RectifiedFlow(), FLOW_TIMES[options.timesteps]
    schedule = getattr(NoiseSchedule, options.schedule)(1000)
    diffusion = GaussianDiffusion(schedule, options.prediction_type, options.variance, LOSS_WEIGHTS[options.loss_weight])
    return network, diffusion, TIMESTEPS[options.timesteps](len(diffusion))


def make_evaluation(options, diffusion, names, size, autoencoder):
    """A function step → {"prompt_accuracy": ...} that draws these names into samples.png; the share is that of drawings read right, if there is a
    reader. Of latents without their autoencoder nothing can be seen."""
    reader, wanted = None, []
    if options.classifier is not None:
        reader, wanted = AttributeClassifier(INGREDIENTS, WAYS), [attributes(name) for name in names]
        load_weights(reader, load_checkpoint(options.classifier))

    def look(step):
        pictures = generate_sheet("samples.png", options, step.network, step.encoder, diffusion, names, size, autoencoder)
        if reader is None:
            return {}
        device = next(step.network.parameters()).device
        right = reader.to(device).exact_matches(torch.from_numpy(pictures).permute(0, 3, 1, 2).to(device), wanted)
        return {"prompt_accuracy": prompt_accuracy(right)}

    return look


def generate_sheet(file, options, network, encoder, diffusion, names, size, autoencoder, show_progress=False):
    """Draw these names into a file of --out; the pictures, uint8 [B, size, size, 3]."""
    if autoencoder is not None:
        autoencoder.to(next(network.parameters()).device)
    pictures = generate_images(network, encoder, diffusion, names, size, guidance=options.guidance, show_progress=show_progress, autoencoder=autoencoder)
    write_atomically(options.out / file, encode_png(contact_sheet([[picture] for picture in pictures], names, columns=6)))
    return pictures


def find_batch_size(options, data, captions, encoder, accelerator) -> int:
    """--batch-size auto: that of the run which goes on, or the largest power of two with which a network like this one has enough memory
    for a training step, in every process."""
    checkpoint = options.out / "model.safetensors"
    if checkpoint.exists():
        return load_newest_checkpoint(checkpoint)["images_per_step"] // accelerator.num_processes
    pictures, longest = data[0][0], max(captions, key=len)

    def step(count):
        encoder_here = copy.deepcopy(encoder)
        network, diffusion, timesteps = build_network(options, pictures.shape, encoder_here)
        run_unsplit(train(network, diffusion, [(pictures.expand(count, *pictures.shape), [longest] * count)], encoder_here, steps=2,
                        timesteps=timesteps, micro_batches=options.micro_batches, muon_learning_rate=options.muon_learning_rate or None,
                        accelerator=accelerator))

    fits = find_largest_batch(step, all_agree=lambda true: not any_rank(accelerator, not true))
    return min(fits, 2 ** ((len(data) // accelerator.num_processes).bit_length() - 1))


def describe_run(options, shape, encoder) -> dict:
    """What two runs must have in common for the weights of one to mean the same in the other."""
    names = ("channels", "attention", "blocks", "heads", "patch", "text_dim", "pooled", "prediction_type", "variance", "schedule", "loss_weight",
             "timesteps")
    return {name: getattr(options, name) for name in names} | {"shape": list(shape), "characters": getattr(encoder, "characters", None)}


def check_run(out: Path, kind: dict) -> None:
    """ValueError where a run of another kind is kept in --out."""
    if (out / "run.json").exists():
        before = json.loads((out / "run.json").read_text("utf-8"))
        before = {OLD_OPTIONS.get(name, name): value for name, value in before.items()}
        if before["prediction_type"] == "noise":
            before["prediction_type"] = "eps"
        if others := [name for name in kind if before.get(name) != kind[name]]:
            told = "; ".join(f"{name}: {before.get(name)}, not {kind[name]}" for name in others if name != "characters")
            raise ValueError(f"{out} holds a run of another kind ({told or 'its captions had other characters'}): give the options that it "
                             "was begun with, or another --out")


def never_plateaued(losses, window) -> bool:
    """For --no-sgd."""
    return False


def main(arguments=None) -> int:
    """Train; see the module's docstring."""
    options = parse_options(arguments)
    warnings.formatwarning = lambda message, *_: f"note: {message}\n"
    accelerator = Accelerator(mixed_precision=options.precision)
    if int(os.environ.get("WORLD_SIZE", 1)) > accelerator.num_processes:
        raise SystemExit("several processes were started, but each believes to be alone: without a GPU set ACCELERATE_USE_CPU=true")
    data, captions, names, autoencoder = load_dataset(options, accelerator)
    pictures = data[0][0].dtype == torch.uint8                              # else latents
    options.patch = options.patch or (4 if pictures else 1)
    torch.manual_seed(options.seed)
    encoder = build_encoder(options, captions, accelerator)
    shape = tuple(data[0][0].shape)
    check_run(options.out, kind := describe_run(options, shape, encoder))
    if options.batch_size == "auto" and not options.generate:
        with fork_rng(options.seed):                                          # afterwards the weights are drawn as if nothing had been tried
            options.batch_size = find_batch_size(options, data, captions, encoder, accelerator)
    network, diffusion, timesteps = build_network(options, shape, encoder)
    size = shape[-1] * (autoencoder.factor if autoencoder is not None else 1)
    if options.generate:
        load_ema_weights(network, encoder, load_newest_checkpoint(options.out / "model.safetensors")["ema"])
        generate_sheet("generated.png", options, network, encoder, diffusion, options.generate, size, autoencoder, show_progress=True)
        print(options.out / "generated.png")
        return 0
    loader = make_loader(data, options.batch_size, None if options.workers < 0 else options.workers, seed=options.seed)
    weights = sum(weight.numel() for weight in network.parameters())
    accelerator.print(f"{len(data)} pictures {list(shape)}, {len(captions)} captions; {weights / 1e6:.1f} M weights; "
                      f"{accelerator.num_processes} × {options.batch_size} pictures a step, {accelerator.device.type}, {options.precision}")
    steps = train(network, diffusion, loader, encoder, steps=options.steps, minutes=options.minutes or None, micro_batches=options.micro_batches,
                  learning_rate=options.learning_rate, muon_learning_rate=options.muon_learning_rate or None, window=options.plateau_window,
                  sgd_learning_rate=options.sgd_learning_rate, plateaued=has_plateaued if options.sgd else never_plateaued, phase=options.phase,
                  warmup=options.warmup, decay=options.decay, weight_decay=options.weight_decay, ema=options.ema,
                  caption_dropout=options.caption_dropout, clip=options.clip, timesteps=timesteps, compile=options.compile,
                  patience=options.patience, spike=options.spike, seed=options.seed, checkpoint=options.out / "model.safetensors",
                  keep=options.keep, save_seconds=options.save_seconds, accelerator=accelerator)
    if accelerator.is_main_process:
        seen = options.sample_minutes > 0 and (autoencoder is not None or pictures)
        steps = track_progress(steps, options.out / "log.csv", options.out / "board" if options.tensorboard else None, options.log_every,
                        make_evaluation(options, diffusion, names, size, autoencoder) if seen else None, options.sample_minutes or 1e9,
                        extra_columns=["prompt_accuracy"] if options.classifier else [])
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


def run_command() -> int:
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
    sys.exit(run_command())

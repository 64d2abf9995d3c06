"""Train a diffusion network on any dataset: python -m easy_diffusion.train_model --minutes 10

Without --data the network is trained on drawn dishes with Chinese names. --data accepts

    a folder of photographs, one subfolder per caption
    an LMDB store that `python -m datasets.aipos_lmdb` or `python -m datasets.table_lmdb` wrote
    an LMDB store of latents; --autoencoder decodes their samples

The default network for images is that of the demo. The network of this project's first version,
which has 93 M weights, is built by

    --channels 128 128 128 256 256 512 512 --attention 2 3 4 --blocks 1 --heads 4
    --text-dim 768 --no-pooled --patch 1 --size 128

Several GPUs, machines, or CPU processes train together; each process takes --batch-size images
per step:

    accelerate launch --multi_gpu -m easy_diffusion.train_model --batch-size 32
    ACCELERATE_USE_CPU=true torchrun --standalone --nproc_per_node 2 -m easy_diffusion.train_model

An interrupted run is resumed by the same command. With --generate NAMES the same command generates
images with the trained network instead of training it. The files in --out are

    run.json            the settings that a resumed run must share
    model.safetensors   the checkpoint; .1, .2 are earlier ones, .best has the lowest loss
    log.csv             loss, loss of each quarter of the schedule, learning rate, images per second
    log.png             the curves of log.csv
    samples.png         samples during training, for captions of the training set;
                        without --data also for held-out names
    generated.png       the images of --generate
    board/              the log for TensorBoard, with --tensorboard

>>> options = parse_options(["--channels", "32", "64", "--minutes", "3"])
>>> dataset = [(torch.zeros(3, 64, 64, dtype=torch.uint8), "番茄汤")] * 24
>>> settings = describe_run(options, dataset, encoder=None)
>>> settings["channels"], settings["prediction_type"], settings["shape"]
([32, 64], 'x0', [3, 64, 64])
"""

import json
import os
import sys
import warnings
import zlib
from pathlib import Path

import torch
from accelerate import Accelerator

from .command_line import RESUMES, check_writable, run_command
from .files import write_atomically
from .train_options import parse_options
from .train_setup import (
    build_encoder,
    build_network,
    find_batch_size,
    generate_sheet,
    load_dataset,
    make_evaluation,
)
from .training.checkpoint import load_ema_weights, load_newest_checkpoint
from .training.data_loader import fork_rng, make_loader
from .training.distributed import check_gpu
from .training.optimizers import has_plateaued
from .training.progress import track_progress
from .training.trainer import train

# Names of options in a run.json of an earlier version.
OLD_OPTIONS = {"predicts": "prediction_type", "words": "text_dim", "weight": "loss_weight"}


# ------------------------------------------------------------------ settings of a run


# Options that must be those that the run was started with
FIXED_OPTIONS = (
    "channels", "attention", "blocks", "heads", "patch", "text_dim", "pooled",
    "prediction_type", "variance", "schedule", "loss_weight", "timesteps",
)
# Options that may change with --allow-changes
HYPERPARAMETERS = (
    "learning_rate", "muon_learning_rate", "sgd_learning_rate", "weight_decay", "warmup", "decay",
    "clip", "ema", "caption_dropout", "dropout", "seed",
)


def describe_run(options, dataset, encoder) -> dict:
    """Return the settings of a run, which run.json contains and a resumed run is compared with."""
    settings = {name: getattr(options, name) for name in FIXED_OPTIONS}
    settings["shape"] = list(dataset[0][0].shape)
    settings["characters"] = getattr(encoder, "characters", None)
    settings |= {name: getattr(options, name) for name in HYPERPARAMETERS}
    settings["data"] = describe_data(dataset)
    return settings


def describe_data(dataset) -> str:
    """Return the number of items and a checksum of eight of them, as one word.

    Of latents, which are drawn anew at each access, it is the checksum of the captions.
    """
    checksum = 0
    for i in range(8):
        image, caption = dataset[i * len(dataset) // 8]
        checksum = zlib.crc32(caption.encode(), checksum)
        if image.dtype == torch.uint8:
            checksum = zlib.crc32(image.contiguous().numpy(), checksum)
    return f"{len(dataset)}-{checksum:08x}"


def check_run(out: Path, settings: dict, allow_changes: bool = False) -> None:
    """Raise ValueError if --out contains a run with other settings than those of `describe_run`.

    allow_changes: whether hyperparameters and data may differ; they are then named in a warning.
    """
    if not (out / "run.json").exists():
        return
    saved = json.loads((out / "run.json").read_text("utf-8"))
    saved = {OLD_OPTIONS.get(name, name): value for name, value in saved.items()}
    if saved["prediction_type"] == "noise":
        saved["prediction_type"] = "eps"
    may_change = {*HYPERPARAMETERS, "data"}
    different = {name for name in settings if saved.get(name) != settings[name]}

    def describe(names) -> str:
        return "; ".join(
            "its captions had other characters" if name == "characters"
            else f"{name}: {saved.get(name)}, not {settings[name]}"
            for name in sorted(names)
        )

    if different - may_change:
        raise ValueError(
            f"{out} contains an incompatible run ({describe(different - may_change)}): use the "
            "options that it was started with, or another --out"
        )
    changed = different & saved.keys()      # the run of an earlier version has not saved them
    if changed and not allow_changes:
        raise ValueError(
            f"{out} contains a run with other settings ({describe(changed)}): use those that it "
            "was started with, or go on with --allow-changes, or use another --out"
        )
    if changed:
        warnings.warn(f"the run was started with {describe(changed)}", stacklevel=2)


# ------------------------------------------------------------------ training


def never_plateaued(losses, window) -> bool:
    """Replace `has_plateaued` for --no-sgd."""
    return False


def main(arguments=None) -> int:
    """Train, or generate images with --generate; returns the exit status.

    arguments: of the command line; None: those of this process. See the module's docstring.
    Raises ValueError or OSError for data, options and files that are missing or incompatible.
    """
    options = parse_options(arguments, description=__doc__.split("\n>>>")[0])
    check_gpu()
    check_writable(options.out)
    warnings.formatwarning = lambda message, *_: f"note: {message}\n"
    accelerator = Accelerator(mixed_precision=options.precision)
    if int(os.environ.get("WORLD_SIZE", 1)) > accelerator.num_processes:
        raise SystemExit(
            "several processes were started, but they are not connected: "
            "without a GPU set ACCELERATE_USE_CPU=true"
        )

    # Data, encoder and a check that the run in --out can be resumed.
    dataset, captions, sample_names, autoencoder = load_dataset(options, accelerator)
    image = dataset[0][0]
    shape = tuple(image.shape)                                  # [C, H, W]
    is_latent = image.dtype != torch.uint8
    if options.generate and is_latent and autoencoder is None:
        raise ValueError(f"--data {options.data} holds latents: --generate needs --autoencoder")
    options.patch = options.patch or (1 if is_latent else 4)
    torch.manual_seed(options.seed)
    encoder = build_encoder(options, captions, accelerator)
    settings = describe_run(options, dataset, encoder)
    check_run(options.out, settings, options.allow_changes or bool(options.generate))

    # Network. fork_rng keeps the initial weights independent of the search for a batch size.
    if options.batch_size == "auto" and not options.generate:
        with fork_rng(options.seed):
            options.batch_size = find_batch_size(options, dataset, captions, encoder, accelerator)
    network, diffusion, timesteps = build_network(options, shape, encoder)
    factor = autoencoder.factor if autoencoder is not None else 1
    size = shape[-2] * factor, shape[-1] * factor               # H, W of the images

    if options.generate:
        saved = load_newest_checkpoint(options.out / "model.safetensors")
        load_ema_weights(network, encoder, diffusion, saved)
        generate_sheet(
            "generated.png", options, network, encoder, diffusion, options.generate, size,
            autoencoder, show_progress=True,
        )
        print(options.out / "generated.png")
        return 0

    # Training.
    workers = None if options.workers < 0 else options.workers
    loader = make_loader(dataset, options.batch_size, workers, seed=options.seed)
    weights = sum(weight.numel() for weight in network.parameters())
    accelerator.print(
        f"{len(dataset)} {'latents' if is_latent else 'images'} {list(shape)}, "
        f"{len(captions)} captions; {weights / 1e6:.1f} M weights; "
        f"{accelerator.num_processes} × {options.batch_size} images per step, "
        f"{accelerator.device.type}, {options.precision}"
    )
    steps = start_training(options, network, diffusion, loader, encoder, timesteps, accelerator)
    if accelerator.is_main_process:
        evaluate = None
        if options.sample_minutes > 0 and (autoencoder is not None or not is_latent):
            evaluate = make_evaluation(options, diffusion, sample_names, size, autoencoder)
        steps = add_progress(options, steps, evaluate)
    return run_training(options, steps, settings, accelerator)


def start_training(options, network, diffusion, loader, encoder, timesteps, accelerator):
    """Call `train` with the options; returns its generator of TrainingSteps."""
    return train(
        network,
        diffusion,
        loader,
        encoder,
        # length, batches and arithmetic
        steps=options.steps,
        minutes=options.minutes or None,
        micro_batches=options.micro_batches,
        timesteps=timesteps,
        caption_dropout=options.caption_dropout,
        ema=options.ema,
        compile=options.compile,
        seed=options.seed,
        accelerator=accelerator,
        # optimizers
        learning_rate=options.learning_rate,
        muon_learning_rate=options.muon_learning_rate or None,
        sgd_learning_rate=options.sgd_learning_rate,
        phase=options.phase,
        plateaued=has_plateaued if options.sgd else never_plateaued,
        window=options.plateau_window,
        warmup=options.warmup,
        decay=options.decay,
        weight_decay=options.weight_decay,
        clip=options.clip,
        # safety
        patience=options.patience,
        spike=options.spike,
        checkpoint=options.out / "model.safetensors",
        keep=options.keep,
        save_seconds=options.save_seconds,
    )


def add_progress(options, steps, evaluate):
    """Wrap the steps with the progress bar, log.csv, log.png and TensorBoard."""
    return track_progress(
        steps,
        csv=options.out / "log.csv",
        tensorboard=options.out / "board" if options.tensorboard else None,
        log_every=options.log_every,
        evaluate=evaluate,
        evaluate_minutes=options.sample_minutes or 1e9,
        extra_columns=["prompt_accuracy"] if options.classifier else [],
    )


def run_training(options, steps, settings: dict, accelerator) -> int:
    """Take all steps, and write run.json after the first; returns the exit status."""
    try:
        first = next(steps, None)
        if accelerator.is_main_process:
            text = json.dumps(settings, ensure_ascii=False, indent=1)
            write_atomically(options.out / "run.json", text.encode())
        if first is None:
            accelerator.print(
                "this run is already finished: ask for more --minutes or --steps, "
                "or start another run with another --out"
            )
        elif first.index > 0:
            accelerator.print(f"resumed after {first.index} steps")
        for _ in steps:
            pass
    except FloatingPointError as error:
        print(f"training failed: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, RESUMES))

"""The options of python -m easy_diffusion.train_model: --help, defaults, and what is refused.

`parse_options` turns a command line into a namespace. It fills in the two defaults that depend on
other options:

    --minutes        no limit if --steps is given; otherwise 2.5 minutes with a GPU, 10 on a CPU
    --loss-weight    none if the network predicts eps; otherwise velocity, the weight of the v loss

train_model.py is the command. train_setup.py builds the dataset and the networks from the options.

>>> options = parse_options(["--channels", "32", "64", "--steps", "1000"])
>>> options.channels, options.steps, options.minutes
([32, 64], 1000, 0)
>>> parse_options(["--prediction-type", "eps"]).loss_weight
'none'
"""

import argparse
import json
import math
from pathlib import Path

import torch

from .command_line import check_ranges
from .networks.text_encoder import CnClipEncoder
from .presets import BATCH, DISHES, GPU_BATCH, PIXEL_UNET, SIZE, TRAINING, default_minutes
from .train_setup import LOSS_WEIGHTS, TEXT_HEADS, TIMESTEPS
from .training.distributed import fast_precision

MINUTES = default_minutes()
BATCH_SIZE = "auto" if torch.cuda.is_available() else BATCH


class HelpFormatter(
    argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter
):
    """Keep the line breaks of the description, and show the default of every option."""


def parse_options(arguments=None, description: str | None = None) -> argparse.Namespace:
    """Parse and check the command line; an invalid option ends the program with a message.

    arguments: of the command line; None: those of this process.
    description: the text above the options in --help.
    """
    parser = argparse.ArgumentParser(
        prog="python -m easy_diffusion.train_model",
        description=description,
        formatter_class=HelpFormatter,
    )
    add_data_options(parser.add_argument_group("data"))
    add_network_options(parser.add_argument_group("network"))
    add_diffusion_options(parser.add_argument_group("diffusion"))
    add_training_options(parser.add_argument_group("training"))
    add_optimizer_options(parser.add_argument_group("optimizer"))
    add_safety_options(parser.add_argument_group("safety"))
    add_output_options(parser.add_argument_group("output"))
    options = parser.parse_args(arguments)
    if options.minutes is None:
        has_step_limit = options.steps != parser.get_default("steps")
        options.minutes = 0 if has_step_limit else MINUTES
    if options.loss_weight == "auto":
        options.loss_weight = "none" if options.prediction_type == "eps" else "velocity"
    check_options(parser, options)
    return options


def add_data_options(group) -> None:
    """Add the options that choose the training data."""
    group.add_argument(
        "--data", type=Path, metavar="FOLDER",
        help="folder of photographs, LMDB store of images or LMDB store of latents to train on; "
        "if omitted, dishes are drawn",
    )
    group.add_argument(
        "--autoencoder", type=Path, metavar="FILE",
        help="autoencoder that encoded the latents of --data; it decodes the samples to images",
    )
    group.add_argument(
        "--dishes", type=int, default=DISHES,
        help="number of dishes to draw if --data is omitted",
    )
    group.add_argument(
        "--size", type=int, default=SIZE,
        help="height and width in pixels of drawn dishes and of photographs; "
        "the images of a store keep their size",
    )
    group.add_argument(
        "--cn-clip", metavar="CHECKPOINT",
        help="Chinese CLIP checkpoint whose text encoder computes the token embeddings of the "
        "store's captions once; if omitted, a character encoder is trained with the network",
    )


def add_network_options(group) -> None:
    """Add the options that set the size of the UNet and of the text encoder."""
    group.add_argument(
        "--channels", type=int, default=list(PIXEL_UNET["channels"]), nargs="+",
        help="number of channels of each level of the UNet, from the finest to the coarsest; "
        "multiples of 32",
    )
    group.add_argument(
        "--attention", type=int, default=[1], nargs="*", metavar="LEVEL",
        help="levels with self- and cross-attention, counted from 0, the finest; "
        "the middle block always has both",
    )
    group.add_argument(
        "--blocks", type=int, default=2,
        help="number of residual blocks per level on the way down; one more on the way up",
    )
    group.add_argument(
        "--heads", type=int, default=PIXEL_UNET["heads"],
        help="number of attention heads",
    )
    group.add_argument(
        "--patch", type=int, default=0,
        help="side in pixels of the squares that the network processes as one position; "
        "0 means 4 for images and 1 for latents",
    )
    group.add_argument(
        "--text-dim", type=int, default=128,
        help="dimension of the token embeddings of the character encoder",
    )
    group.add_argument(
        "--dropout", type=float, default=0.0,
        help="probability with which a value inside a residual block is set to zero in training",
    )
    group.add_argument(
        "--pooled", action=argparse.BooleanOptionalAction, default=True,
        help="add the mean of the token embeddings to the time embedding",
    )
    group.add_argument(
        "--checkpointing", action=argparse.BooleanOptionalAction, default=False,
        help="recompute the activations of each block in the backward pass instead of storing "
        "them: two fifths of the memory, a fifth more time (python -m benchmarks.memory)",
    )


def add_diffusion_options(group) -> None:
    """Add the options of the noise schedule, the loss and the guidance."""
    group.add_argument(
        "--schedule", choices=("cosine", "linear", "quad", "jsd", "sigmoid"), default="cosine",
        help="noise schedule of 1000 timesteps",
    )
    group.add_argument(
        "--prediction-type", choices=("x0", "v", "eps", "velocity"), default="x0",
        help="quantity that the network is trained to predict: the clean image (x0), v, the noise "
        "(eps), or the velocity of rectified flow, which has no noise schedule, variance or loss "
        "weight",
    )
    group.add_argument(
        "--variance", choices=("fixed_small", "fixed_large", "learned_range"),
        default="fixed_small",
        help="variance of a reverse step: the posterior variance (fixed_small), beta_t "
        "(fixed_large), or a value between both that the network predicts with additional "
        "output channels, trained on the variational bound (learned_range)",
    )
    group.add_argument(
        "--loss-weight", choices=("auto", *LOSS_WEIGHTS), default="auto",
        help="weight of the loss at each timestep: that of the v loss (velocity), min-SNR, or a "
        "constant (none); auto is none if the network predicts eps, else velocity",
    )
    group.add_argument(
        "--timesteps", choices=tuple(TIMESTEPS), default="logit-normal",
        help="distribution that training timesteps are drawn from; importance draws timesteps "
        "with a large loss more often",
    )
    group.add_argument(
        "--caption-dropout", type=float, default=0.1,
        help="fraction of captions that training replaces by the empty caption, from which the "
        "unconditional prediction of classifier-free guidance is learned",
    )


def add_training_options(group) -> None:
    """Add the options of the run's length, its batches and its arithmetic."""
    group.add_argument(
        "--minutes", type=float,
        help=f"training time in minutes; if omitted, {MINUTES:g}, or no limit if --steps is given",
    )
    group.add_argument(
        "--steps", type=int, default=10**7,
        help="largest number of training steps",
    )
    group.add_argument(
        "--batch-size", type=parse_batch_size, default=BATCH_SIZE,
        help="images per step and process; auto, the default with a GPU, finds the largest power "
        f"of two, at most {GPU_BATCH}, that fits into memory",
    )
    group.add_argument(
        "--micro-batches", type=int, default=1,
        help="number of parts into which a batch is split; their gradients are accumulated, "
        "which saves memory",
    )
    group.add_argument(
        "--workers", type=int, default=-1,
        help="number of processes that load images; -1 means none on a CPU and four with a GPU",
    )
    group.add_argument(
        "--ema", type=float, default=TRAINING["ema"],
        help="decay per step of the exponential moving average of the weights",
    )
    group.add_argument(
        "--precision", choices=("no", "bf16", "fp16"), default=fast_precision(),
        help="mixed precision of the network: bfloat16, float16 with a gradient scaler, or none "
        "(float32); the default is the fastest on this device",
    )
    group.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=False,
        help="compile the network with torch.compile",
    )
    group.add_argument(
        "--seed", type=int, default=0,
        help="seed of the initial weights, the order of the images and all other randomness",
    )


def add_optimizer_options(group) -> None:
    """Add the options of AdamW, Muon and SGD and of their learning rates."""
    group.add_argument(
        "--learning-rate", type=float, default=TRAINING["learning_rate"],
        help="peak learning rate of AdamW",
    )
    group.add_argument(
        "--muon-learning-rate", type=float, default=TRAINING["muon_learning_rate"],
        help="peak learning rate of Muon, which trains the weight matrices; 0 trains them with "
        "AdamW, too, which then needs a smaller learning rate, such as 1e-4",
    )
    group.add_argument(
        "--sgd-learning-rate", type=float, default=1e-6,
        help="constant learning rate of SGD",
    )
    group.add_argument(
        "--phase", choices=("adamw", "sgd"), default="adamw",
        help="optimizer at the start of the run; adamw includes Muon",
    )
    group.add_argument(
        "--sgd", action=argparse.BooleanOptionalAction, default=True,
        help="change from AdamW to SGD when the loss has plateaued",
    )
    group.add_argument(
        "--plateau-window", type=int, default=2000,
        help="length in steps of the two windows whose mean losses decide whether training has "
        "plateaued",
    )
    group.add_argument(
        "--warmup", type=int, default=100,
        help="number of steps in which the learning rate rises from 0 to its peak",
    )
    group.add_argument(
        "--decay", type=float, default=TRAINING["decay"],
        help="fraction of the run, at its end, in which the learning rate falls to 0; a finished "
        "run that is prolonged returns to a higher rate",
    )
    group.add_argument(
        "--weight-decay", type=float, default=0.01,
        help="weight decay of AdamW and Muon",
    )
    group.add_argument(
        "--clip", type=float, default=1.0,
        help="norm to which a larger gradient is clipped",
    )


def add_safety_options(group) -> None:
    """Add the options of checkpoints and of unhealthy steps."""
    group.add_argument(
        "--patience", type=int, default=5,
        help="number of consecutive skipped steps (loss or gradient not finite, or a spike) after "
        "which the run rolls back to earlier EMA weights",
    )
    group.add_argument(
        "--spike", type=float, default=20.0,
        help="a loss is a spike if it exceeds the mean of the last 100 by this many times (their "
        "standard deviation plus a tenth of their mean); inf disables the check",
    )
    group.add_argument(
        "--keep", type=int, default=3,
        help="number of checkpoints to keep; from 2 on the one with the lowest loss is also kept",
    )
    group.add_argument(
        "--save-seconds", type=float, default=60.0,
        help="seconds of training between two checkpoints",
    )


def add_output_options(group) -> None:
    """Add the options of the log and of the samples."""
    group.add_argument(
        "--out", type=Path, default=Path("out/train"), metavar="FOLDER",
        help="folder for everything that the run writes, and from which it resumes",
    )
    group.add_argument(
        "--allow-changes", action=argparse.BooleanOptionalAction, default=False,
        help="resume the run in --out even if its hyperparameters or its data were others",
    )
    group.add_argument(
        "--log-every", type=int, default=10,
        help="number of steps between two rows of log.csv",
    )
    group.add_argument(
        "--tensorboard", action=argparse.BooleanOptionalAction, default=False,
        help="also write the log for TensorBoard",
    )
    group.add_argument(
        "--sample-minutes", type=float, default=2.0,
        help="minutes of training between two updates of samples.png and log.png; 0 writes no "
        "samples, and log.png only at the end",
    )
    group.add_argument(
        "--guidance", type=float, default=2.0,
        help="scale of classifier-free guidance for samples; 1 is no guidance",
    )
    group.add_argument(
        "--classifier", type=Path, metavar="FILE",
        help="attribute classifier, such as python -m benchmarks.fidelity saves; it measures the "
        "prompt accuracy of samples of drawn dishes",
    )
    group.add_argument(
        "--generate", nargs="+", metavar="NAME",
        help="do not train; generate an image of each name with the trained network",
    )


def parse_batch_size(text: str) -> int | str:
    """Parse --batch-size: a positive number or "auto"; argparse reports any other text."""
    if text == "auto":
        return text
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a number of 1 or more, or auto, not {text}")
    return int(text)


# The range of each number, both ends included; floats are also finite.
RANGES = {
    "dishes": (1, math.inf),
    "size": (8, 4096),
    "blocks": (1, math.inf),
    "heads": (1, math.inf),
    "patch": (0, math.inf),
    "text_dim": (4, math.inf),
    "dropout": (0, 0.99),
    "caption_dropout": (0, 1),
    "minutes": (0, math.inf),
    "steps": (1, math.inf),
    "micro_batches": (1, math.inf),
    "workers": (-1, 1024),
    "ema": (0, 0.999999),
    "seed": (0, 2**63 - 1),
    "learning_rate": (1e-12, 10),
    "muon_learning_rate": (0, 10),
    "sgd_learning_rate": (1e-12, 10),
    "plateau_window": (2, math.inf),
    "warmup": (0, math.inf),
    "decay": (0, 1),
    "weight_decay": (0, math.inf),
    "clip": (1e-12, math.inf),
    "patience": (1, math.inf),
    "keep": (1, 1000),
    "save_seconds": (0, math.inf),
    "log_every": (1, math.inf),
    "sample_minutes": (0, math.inf),
    "guidance": (0, 1000),
}


def check_options(parser: argparse.ArgumentParser, options) -> None:
    """End the program with a message if options are out of range or contradict each other.

    All that can be checked without the data is checked here, before the long work begins.
    """
    check_ranges(parser, options, RANGES)
    if not options.spike > 0:               # inf is allowed, nan is not
        parser.error(f"--spike must be greater than 0, not {options.spike:g}")
    check_network_options(parser, options)
    check_files(parser, options)
    if options.prediction_type == "velocity":
        if options.timesteps == "importance":
            parser.error("--prediction-type velocity cannot use --timesteps importance")
        if options.variance == "learned_range":
            parser.error("--prediction-type velocity cannot use --variance learned_range")


def check_network_options(parser: argparse.ArgumentParser, options) -> None:
    """End the program with a message if no network can be built with these options."""
    levels = range(len(options.channels))
    for level in options.attention:
        if level not in levels:
            parser.error(f"--attention {level}: --channels has the levels 0 to {levels[-1]}")
    for channels in options.channels:
        if channels < 32 or channels % 32:
            parser.error(f"--channels must be multiples of 32, not {channels}")
    attending = {options.channels[level] for level in [*options.attention, levels[-1]]}
    for channels in sorted(attending):
        if channels % options.heads:
            parser.error(f"--heads {options.heads} does not divide the {channels} --channels")
    if options.text_dim % TEXT_HEADS:
        parser.error(f"--text-dim must be a multiple of {TEXT_HEADS}, not {options.text_dim}")
    # The images of a store, and latents, have a size of their own.
    is_store = options.data is not None and (options.data / "data.mdb").exists()
    multiple = (options.patch or 4) * 2 ** levels[-1]
    if not is_store and options.size % multiple:
        parser.error(
            f"--size must be a multiple of {multiple} with this --patch and {len(levels)} "
            f"--channels, not {options.size}"
        )


def check_files(parser: argparse.ArgumentParser, options) -> None:
    """End the program with a message if a file is missing or the batch is larger than the data."""
    if options.tensorboard and not is_tensorboard_installed():
        parser.error(
            "--tensorboard needs a library: pip install tensorboard; "
            "log.csv has the same values without it"
        )
    for name in ("data", "autoencoder", "classifier"):
        path = getattr(options, name)
        if path is not None and not path.exists():
            parser.error(f"--{name} {path} does not exist")
    if options.cn_clip and not options.data:
        parser.error("--cn-clip saves token embeddings in a store: choose one with --data")
    if options.cn_clip:
        check_cn_clip(parser, options.cn_clip)
    if options.data is None and options.batch_size != "auto":
        if options.batch_size > options.dishes:
            parser.error(
                f"--batch-size {options.batch_size} is larger than --dishes {options.dishes}"
            )
    checkpoint = options.out / "model.safetensors"
    if options.generate and not checkpoint.exists():
        parser.error(f"--generate needs a trained network: there is no {checkpoint}")
    run = options.out / "run.json"
    if run.exists():
        try:
            json.loads(run.read_text("utf-8"))
        except ValueError as error:
            parser.error(f"{run} is damaged: {error}; delete it, or use another --out")


def check_cn_clip(parser: argparse.ArgumentParser, source: str) -> None:
    """End the program with a message if the file of Chinese CLIP cannot be loaded."""
    from cn_clip.clip import available_models

    if source in available_models() and not Path(source).exists():
        return
    try:
        CnClipEncoder(source)
    except (OSError, ValueError) as error:
        parser.error(f"--cn-clip {source}: {error}")


def is_tensorboard_installed() -> bool:
    """Return whether the library for --tensorboard can be imported."""
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        return False
    return True

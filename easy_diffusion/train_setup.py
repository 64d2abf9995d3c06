"""From the options of train_model to a dataset, a text encoder, a network and a diffusion.

The functions in the order in which `main` of train_model.py calls them:

    load_dataset       drawn dishes, a folder of photographs, or an LMDB store of images or latents
    build_encoder      a character encoder to be trained, or stored embeddings of Chinese CLIP
    find_batch_size    the largest batch that fits into memory, for --batch-size auto
    build_network      the UNet, the diffusion, and the distribution of the training timesteps
    make_evaluation    the function that generates samples.png during training

`options` is always the namespace of `parse_options` in train_options.py.

>>> from types import SimpleNamespace
>>> from .train_options import parse_options
>>> options = parse_options(["--prediction-type", "v", "--variance", "learned_range"])
>>> network, diffusion, timesteps = build_network(options, (3, 64, 64), SimpleNamespace(dim=128))
>>> diffusion.prediction_type, len(diffusion), timesteps.__name__
('v', 1000, 'logit_normal_timesteps')
"""

import copy
import random
import warnings
from functools import partial

import torch

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
from .diffusion.timesteps import (
    ImportanceTimesteps,
    logit_normal_time,
    logit_normal_timesteps,
    uniform_time,
    uniform_timesteps,
)
from .evaluation.attribute_classifier import AttributeClassifier, prompt_accuracy
from .files import write_atomically
from .generate import generate_images
from .images import contact_sheet, encode_png
from .latent_space import fingerprint
from .networks.autoencoder import load_autoencoder
from .networks.text_encoder import CharacterEncoder, CnClipEncoder
from .networks.unet import UNet
from .networks.weights_io import load_weights
from .presets import GPU_BATCH, prepare_dishes
from .training.checkpoint import load_checkpoint, load_newest_checkpoint
from .training.distributed import any_rank, main_process_first
from .training.memory import find_largest_batch, run_unsplit
from .training.trainer import train

# --timesteps: (number of timesteps) → the distribution that `train` draws from
TIMESTEPS = {
    "logit-normal": lambda steps: logit_normal_timesteps,
    "uniform": lambda steps: uniform_timesteps,
    "importance": ImportanceTimesteps,
}
# the same for --prediction-type velocity, whose time is continuous
FLOW_TIMES = {"logit-normal": logit_normal_time, "uniform": uniform_time}
# Longest caption for the character encoder, in characters: attention takes time and memory that
# grow with the square of the longest caption in a batch.
MAX_CAPTION = 127
TEXT_HEADS = 4          # attention heads of the character encoder
LOSS_WEIGHTS = {"velocity": velocity_weight, "min-snr": min_snr_weight, "none": None}


# ------------------------------------------------------------------ data and text encoder


class CutCaptions(torch.utils.data.Dataset):
    """A dataset whose captions are cut after MAX_CAPTION characters."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        image, caption = self.dataset[index]
        return image, caption[:MAX_CAPTION]


def load_dataset(options, accelerator) -> tuple:
    """Load --data, or draw dishes: (dataset, captions, sample names, autoencoder or None).

    captions: all captions that the encoder must know. sample names: captions for samples.png.
    """
    if options.data is None:
        folder = options.out / f"dishes_{options.size}"
        prepare = partial(prepare_dishes, folder, options.dishes, options.size)
        sample_names = [
            *random.Random(0).sample(dish_names("train"), 6),
            *random.Random(0).sample(dish_names("held_out"), 6),
        ]
        dataset = main_process_first(accelerator, prepare)
        return dataset, dish_names("train") + sample_names, sample_names, None
    autoencoder = load_autoencoder(options.autoencoder) if options.autoencoder else None
    if not (options.data / "data.mdb").exists():
        dataset = AiposFood(options.data, options.size)
        captions = dataset.captions
    elif b"latents" in (lmdb_store.read_metadata(options.data) or b""):
        dataset = LatentLmdb(options.data, fingerprint(autoencoder) if autoencoder else None)
        captions = [dataset[i][1] for i in range(len(dataset))]
    else:
        dataset = AiposFoodLmdb(options.data)
        captions = list(lmdb_store.read_captions(options.data))
    too_long = sum(len(caption) > MAX_CAPTION for caption in captions)
    if too_long and not options.cn_clip:
        warnings.warn(
            f"{too_long} of {len(captions)} captions are cut after {MAX_CAPTION} characters",
            stacklevel=2,
        )
        dataset = CutCaptions(dataset)
        captions = [caption[:MAX_CAPTION] for caption in captions]
    captions = list(dict.fromkeys(captions))
    sample_names = random.Random(0).sample(captions, min(12, len(captions)))
    return dataset, captions, sample_names, autoencoder


def build_encoder(options, captions: list[str], accelerator) -> torch.nn.Module:
    """Build the text encoder, captions → (context [B, L, D], mask bool [B, L]).

    It is a character encoder to be trained, or the token embeddings of Chinese CLIP, which are
    computed once and saved in the store.
    """
    if not options.cn_clip:
        # a caption of n characters has n + 1 tokens: the first is the start token
        max_length = max(32, 1 + max(len(caption) for caption in captions))
        return CharacterEncoder(
            "".join(captions),
            dim=options.text_dim,
            layers=2,
            heads=TEXT_HEADS,
            max_length=max_length,
        )

    def prepare():
        cn_clip = CnClipEncoder(options.cn_clip)        # it may be downloaded
        for _ in write_caption_embeddings(options.data, cn_clip, cn_clip.fingerprint()):
            pass
        return StoredCaptionEmbeddings(options.data, cn_clip.fingerprint())

    return main_process_first(accelerator, prepare)


# ------------------------------------------------------------------ network and batch size


def build_network(options, shape: tuple, encoder) -> tuple:
    """Build (network, diffusion, timestep distribution).

    shape: [C, H, W] of the images or latents.
    """
    output_channels = shape[0] * (2 if options.variance == "learned_range" else 1)
    network = UNet(
        shape[0],
        output_channels,
        channels=tuple(options.channels),
        attention=tuple(level in options.attention for level in range(len(options.channels))),
        blocks=options.blocks,
        heads=options.heads,
        patch=options.patch or 4,
        context_dim=encoder.dim,
        pooled=options.pooled,
        dropout=options.dropout,
        checkpointing=options.checkpointing,
    )
    if options.prediction_type == "velocity":
        return network, RectifiedFlow(), FLOW_TIMES[options.timesteps]
    make_schedule = getattr(NoiseSchedule, options.schedule)
    diffusion = GaussianDiffusion(
        make_schedule(1000),
        options.prediction_type,
        options.variance,
        LOSS_WEIGHTS[options.loss_weight],
    )
    return network, diffusion, TIMESTEPS[options.timesteps](len(diffusion))


def find_batch_size(options, dataset, captions: list[str], encoder, accelerator) -> int:
    """Find the value of --batch-size auto.

    A resumed run keeps its batch size. A new run takes the largest power of two, at most GPU_BATCH,
    for which a training step fits into the memory of every process.
    """
    checkpoint = options.out / "model.safetensors"
    if checkpoint.exists():
        return load_newest_checkpoint(checkpoint)["images_per_step"] // accelerator.num_processes
    image = dataset[0][0]
    longest_caption = max(captions, key=len)

    def try_batch_size(batch_size):
        trial_encoder = copy.deepcopy(encoder)
        network, diffusion, timesteps = build_network(options, image.shape, trial_encoder)
        batch = (image.expand(batch_size, *image.shape), [longest_caption] * batch_size)
        steps = train(
            network,
            diffusion,
            [batch],
            trial_encoder,
            steps=2,
            timesteps=timesteps,
            micro_batches=options.micro_batches,
            muon_learning_rate=options.muon_learning_rate or None,
            accelerator=accelerator,
        )
        run_unsplit(steps)

    def all_processes(fits: bool) -> bool:
        return not any_rank(accelerator, not fits)

    largest = find_largest_batch(try_batch_size, GPU_BATCH, all_processes)
    images_per_process = len(dataset) // accelerator.num_processes
    largest_power_of_two = 2 ** (images_per_process.bit_length() - 1)
    return min(largest, largest_power_of_two)


# ------------------------------------------------------------------ samples


def make_evaluation(options, diffusion, names: list[str], size: tuple[int, int], autoencoder):
    """Make the function TrainingStep → metrics that writes samples.png.

    names: captions of the samples. size: (height, width) of the images in pixels.
    With --classifier the metrics are {"prompt_accuracy": float}, otherwise they are empty.
    Raises ValueError if the classifier does not know one of the names.
    """
    classifier = None
    dishes = []
    if options.classifier is not None:
        classifier = AttributeClassifier(INGREDIENTS, WAYS)
        load_weights(classifier, load_checkpoint(options.classifier))
        dishes = [attributes(name) for name in names]

    def evaluate(step) -> dict:
        images = generate_sheet(
            "samples.png", options, step.ema_network, step.ema_encoder, diffusion, names, size,
            autoencoder,
        )
        if classifier is None:
            return {}
        device = next(step.ema_network.parameters()).device
        images = torch.from_numpy(images).permute(0, 3, 1, 2).to(device)    # [B, 3, H, W]
        matches = classifier.to(device).exact_matches(images, dishes)
        return {"prompt_accuracy": prompt_accuracy(matches)}

    return evaluate


def generate_sheet(
    file: str,
    options,
    network,
    encoder,
    diffusion,
    names: list[str],
    size: tuple[int, int],
    autoencoder,
    show_progress: bool = False,
):
    """Generate an image of each name and write all of them to `file` in --out.

    Returns the images, uint8 [B, height, width, 3].
    """
    if autoencoder is not None:
        autoencoder.to(next(network.parameters()).device)
    images = generate_images(
        network,
        encoder,
        diffusion,
        names,
        size,
        guidance=options.guidance,
        show_progress=show_progress,
        autoencoder=autoencoder,
    )
    sheet = contact_sheet([[image] for image in images], names, columns=6)
    write_atomically(options.out / file, encode_png(sheet))
    return images

"""Training: the loop, and the parts that make a long training robust.

The files, in reading order:

    trainer.py             train: the training loop, as a generator of steps
    data_loader.py         shuffled batches in worker processes; resumable at any step
    optimizers.py          AdamW, Muon, learning rates, gradient clipping, the plateau test
    muon.py                Muon: an optimizer for matrices
    ema.py                 exponential moving average of the weights
    health.py              non-finite losses and spikes: skip, roll back, give up
    memory.py              out of memory; the largest batch that fits
    distributed.py         what several processes exchange; the precision that is fast
    checkpoint.py          the state of a training in a safetensors file, written atomically
    progress.py            progress bar, CSV log, curves, TensorBoard, and the training's clock
    train_autoencoder.py   training an autoencoder
    autoencoder_losses.py  its losses: reconstruction, perceptual, patch discriminator
    finetune_cn_clip.py    fine-tuning Chinese CLIP on one's own dishes

This folder needs diffusion/, networks/ and files.py beside it. It needs torch, safetensors,
accelerate, psutil, matplotlib and tqdm; finetune_cn_clip.py also needs cn_clip, and TensorBoard
logs need tensorboard.
"""

from .autoencoder_losses import (
    LPIPS,
    PatchDiscriminator,
    adaptive_weight,
    discriminator_loss,
    laplacian_pyramid,
    structure_loss,
)
from .checkpoint import (
    load_checkpoint,
    load_ema_weights,
    load_newest_checkpoint,
    save_checkpoint,
    save_or_warn,
)
from .data_loader import (
    BatchDataset,
    ResumableBatchSampler,
    derive_seed,
    fork_rng,
    images_per_step,
    infinite_batches,
    make_loader,
)
from .distributed import (
    any_rank,
    autocast,
    average_gradients,
    broadcast_parameters,
    default_accelerator,
    fast_precision,
    reduce_metrics,
)
from .ema import update_ema
from .finetune_cn_clip import (
    FinetuneStep,
    compute_recall,
    contrastive_loss,
    encode_captions,
    encode_images,
    evaluate_retrieval,
    finetune,
    load_cn_clip,
    save_cn_clip,
)
from .health import TrainingHealth
from .memory import catch_out_of_memory, find_largest_batch, free_memory, run_unsplit
from .muon import Muon, orthogonalize
from .optimizers import build_optimizers, clip_grad_norm, has_plateaued, set_learning_rates
from .progress import CsvLog, TrainingClock, plot_curves, read_rows, save_curves, track_progress
from .train_autoencoder import AutoencoderStep, measure_latent_scale, train_autoencoder
from .trainer import TrainingStep, train, update_quartile_losses

__all__ = [
    "LPIPS",
    "AutoencoderStep",
    "BatchDataset",
    "CsvLog",
    "FinetuneStep",
    "Muon",
    "PatchDiscriminator",
    "ResumableBatchSampler",
    "TrainingClock",
    "TrainingHealth",
    "TrainingStep",
    "adaptive_weight",
    "any_rank",
    "autocast",
    "average_gradients",
    "broadcast_parameters",
    "build_optimizers",
    "catch_out_of_memory",
    "clip_grad_norm",
    "compute_recall",
    "contrastive_loss",
    "default_accelerator",
    "derive_seed",
    "discriminator_loss",
    "encode_captions",
    "encode_images",
    "evaluate_retrieval",
    "fast_precision",
    "find_largest_batch",
    "finetune",
    "fork_rng",
    "free_memory",
    "has_plateaued",
    "images_per_step",
    "infinite_batches",
    "laplacian_pyramid",
    "load_checkpoint",
    "load_cn_clip",
    "load_ema_weights",
    "load_newest_checkpoint",
    "make_loader",
    "measure_latent_scale",
    "orthogonalize",
    "plot_curves",
    "read_rows",
    "reduce_metrics",
    "run_unsplit",
    "save_checkpoint",
    "save_cn_clip",
    "save_curves",
    "save_or_warn",
    "set_learning_rates",
    "structure_loss",
    "track_progress",
    "train",
    "train_autoencoder",
    "update_ema",
    "update_quartile_losses",
]

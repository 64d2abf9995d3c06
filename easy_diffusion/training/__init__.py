"""Training: the loop, and the parts that make a long training robust.

The files, in reading order:

    simple.py              train_simple: the training loop in forty lines
    trainer.py             train: the same step made robust, as a generator of steps
    training_step.py       what train yields
    options.py             its options, in groups
    data_loader.py         shuffled batches in worker processes; resumable at any step
    draws.py               timesteps, dropped captions and noise of a step, repeatable
    optimizers.py          AdamW, Muon, SGD; learning rates, gradient clipping, the plateau test
    muon.py                Muon: an optimizer for matrices
    clock.py               steps, seconds, and the learning rate over the run
    ema.py                 exponential moving average of the weights
    loss_history.py        all losses, smoothed, and of each quarter of the noise schedule
    health.py              non-finite losses and spikes: skip, roll back, give up
    memory.py              out of memory: micro-batches; the largest batch that fits
    cuda_graphs.py         the operations of a step, recorded once and replayed by a GPU
    weight_casts.py        mixed precision with a single cast of all weights
    operations.py          the operations of a step, counted by name
    distributed.py         what processes exchange; the fastest precision; a check of the GPU
    checkpoint.py          the state of a training in a safetensors file, written atomically
    lock.py                one training at a time for a checkpoint
    progress.py            progress bar, CSV log, curves, TensorBoard
    train_autoencoder.py   training an autoencoder
    autoencoder_losses.py  its losses: structure, distance in features, LPIPS, discriminator
    finetune_cn_clip.py    fine-tuning Chinese CLIP on one's own dishes

This folder needs diffusion/, networks/ and files.py beside it. It needs torch, safetensors,
accelerate, psutil, matplotlib and tqdm; finetune_cn_clip.py also needs cn_clip, and TensorBoard
logs need tensorboard.
"""

from .autoencoder_losses import (
    LPIPS,
    FeatureDistance,
    PatchDiscriminator,
    adaptive_weight,
    build_perceptual,
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
from .clock import TrainingClock
from .cuda_graphs import CudaGraphs
from .data_loader import (
    Batch,
    BatchDataset,
    ResumableBatchSampler,
    derive_seed,
    fork_rng,
    images_per_step,
    infinite_batches,
    make_loader,
    normalize_pixels,
    prepare_loader,
    unpack_batch,
)
from .distributed import (
    any_rank,
    autocast,
    average_gradients,
    broadcast_parameters,
    check_gpu,
    default_accelerator,
    default_device,
    fast_precision,
    reduce_metrics,
)
from .draws import StepDraws
from .ema import EMA, update_ema
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
from .lock import training_lock
from .loss_history import LossHistory, update_quartile_losses
from .memory import (
    MicroBatches,
    catch_out_of_memory,
    find_largest_batch,
    free_memory,
    run_unsplit,
)
from .muon import Muon, orthogonalize
from .optimizers import (
    OptimizerPhases,
    build_optimizers,
    clip_grad_norm,
    compute_grad_norm,
    descend,
    has_plateaued,
    set_learning_rates,
)
from .options import (
    AdversarialOptions,
    AutoencoderOptions,
    OptimizerOptions,
    PlateauOptions,
    ReconstructionOptions,
    RunOptions,
    SafetyOptions,
    TrainingOptions,
    replace_options,
)
from .progress import CsvLog, plot_curves, read_rows, save_curves, track_progress
from .simple import SimpleStep, train_simple
from .train_autoencoder import (
    AutoencoderStep,
    AutoencoderTrainer,
    measure_latent_scale,
    train_autoencoder,
)
from .trainer import Trainer, train
from .training_step import TrainingStep
from .weight_casts import WeightCasts

__all__ = [
    "EMA",
    "LPIPS",
    "AdversarialOptions",
    "AutoencoderOptions",
    "AutoencoderStep",
    "AutoencoderTrainer",
    "Batch",
    "BatchDataset",
    "CsvLog",
    "CudaGraphs",
    "FeatureDistance",
    "FinetuneStep",
    "LossHistory",
    "MicroBatches",
    "Muon",
    "OptimizerOptions",
    "OptimizerPhases",
    "PatchDiscriminator",
    "PlateauOptions",
    "ReconstructionOptions",
    "ResumableBatchSampler",
    "RunOptions",
    "SafetyOptions",
    "SimpleStep",
    "StepDraws",
    "Trainer",
    "TrainingClock",
    "TrainingHealth",
    "TrainingOptions",
    "TrainingStep",
    "WeightCasts",
    "adaptive_weight",
    "any_rank",
    "build_perceptual",
    "autocast",
    "average_gradients",
    "broadcast_parameters",
    "build_optimizers",
    "catch_out_of_memory",
    "check_gpu",
    "clip_grad_norm",
    "compute_grad_norm",
    "compute_recall",
    "contrastive_loss",
    "default_accelerator",
    "default_device",
    "derive_seed",
    "descend",
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
    "normalize_pixels",
    "orthogonalize",
    "plot_curves",
    "prepare_loader",
    "read_rows",
    "reduce_metrics",
    "replace_options",
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
    "train_simple",
    "training_lock",
    "unpack_batch",
    "update_ema",
    "update_quartile_losses",
]

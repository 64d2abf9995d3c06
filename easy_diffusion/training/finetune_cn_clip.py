"""Fine-tuning Chinese CLIP (cn_clip) on one's own images and captions.

Let I_i and T_j be the unit-length embeddings of image i and caption j of a batch, and s the inverse
temperature. The symmetric contrastive loss is

    loss = ½ (mean_i -log softmax_j(s I_i · T_j)  at j = i        # the right caption of each image
              + mean_j -log softmax_i(s I_i · T_j)  at i = j)     # the right image of each caption

(Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021,
figure 3). A batch of dishes may have the same caption twice. Both images are then right for it, and
the target probability is divided between them.

The result is measured by retrieval: recall@k is the fraction of images whose own caption is among
the k nearest of all captions.

`save_cn_clip` writes a checkpoint that cn_clip's `load_from_name` and `CnClipEncoder` of
networks/text_encoder.py read. The file needs torch, torchvision and cn_clip and, beside it,
checkpoint.py, clock.py, data_loader.py, distributed.py, lock.py, muon.py and optimizers.py; from
this package also files.py and networks/weights_io.py.

>>> captions = ["番茄汤", "土豆丝", "炒面"]
>>> embeddings = torch.eye(3)
>>> loss = contrastive_loss(embeddings, embeddings, torch.tensor(100.0), captions)
>>> bool(loss < 1e-6)
True
>>> compute_recall(embeddings, captions, embeddings, captions)
1.0
"""

import contextlib
import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..files import atomic_path
from ..networks.weights_io import load_weights, read_tensors
from .checkpoint import load_checkpoint, save_checkpoint
from .clock import TrainingClock
from .data_loader import infinite_batches, unpack_batch
from .lock import training_lock
from .optimizers import descend, set_learning_rates

# Mean and standard deviation of CLIP's training images, for values in [0, 1].
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

MAX_LOG_SCALE = 4.6052                  # log 100: s is at most 100, as in CLIP's training


# ---------------------------------------------------------------- model files


def load_cn_clip(
    path, vision: str = "ViT-B-16", text: str = "RoBERTa-wwm-ext-base-chinese"
) -> torch.nn.Module:
    """Load cn_clip's whole model from a checkpoint; in eval mode and float32.

    path: a checkpoint of cn_clip or of `save_cn_clip`.
    vision, text: cn_clip's names of the image encoder and of the text encoder in it.

    The model's `input_resolution` is the side of its input images in pixels. Raises
    FileNotFoundError, or ValueError for a damaged file and for one with other encoders.
    """
    import cn_clip.clip
    from cn_clip.clip.utils import create_model
    state = {
        name.removeprefix("module."): tensor
        for name, tensor in read_tensors(path).items() if "bert.pooler" not in name
    }
    with contextlib.redirect_stdout(io.StringIO()):             # create_model prints its settings
        model = create_model(f"{vision}@{text}").float()
    load_weights(model, state)
    config = Path(cn_clip.clip.__file__).parent / "model_configs" / f"{vision}.json"
    model.input_resolution = json.loads(config.read_text("utf-8"))["image_resolution"]
    return model.eval()


def save_cn_clip(path, model, step: int = 0) -> None:
    """Save a model as a checkpoint of cn_clip's training, in float16.

    cn_clip's `load_from_name` converts the weights to float16 in any case.

    path: the file to write, usually with the suffix .pt.
    step: number of training steps, stored in the file.
    """
    state = {}
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor = tensor.half()
        state[f"module.{name}"] = tensor.detach().cpu()
    checkpoint = {"epoch": 0, "step": step, "name": Path(path).stem, "state_dict": state}
    with atomic_path(path) as temporary:
        torch.save(checkpoint, temporary)


# ---------------------------------------------------------------- embeddings, loss and recall


def encode_images(model, images: torch.Tensor) -> torch.Tensor:
    """Return the unit-length embeddings [B, D] of images uint8 [B, 3, H, W] of any size."""
    mean = torch.tensor(MEAN, device=images.device).view(3, 1, 1)
    std = torch.tensor(STD, device=images.device).view(3, 1, 1)
    size = (model.input_resolution, model.input_resolution)
    images = F.interpolate(
        images.float() / 255, size, mode="bicubic", antialias=True, align_corners=False
    )
    embeddings = model.encode_image((images.clamp(0, 1) - mean) / std)      # [B, D]
    return F.normalize(embeddings, dim=-1)


def encode_captions(model, captions: list[str]) -> torch.Tensor:
    """Return the unit-length embeddings [B, D] of captions."""
    from cn_clip.clip import tokenize
    tokens = tokenize(captions).to(model.logit_scale.device)                # [B, L]
    return F.normalize(model.encode_text(tokens), dim=-1)


def contrastive_loss(
    image_embeddings: torch.Tensor,
    caption_embeddings: torch.Tensor,
    scale: torch.Tensor,
    captions: list[str],
) -> torch.Tensor:
    """Return the symmetric contrastive loss of a batch, a scalar.

    image_embeddings, caption_embeddings: unit-length, both [B, D].
    scale: the inverse temperature s, a scalar.
    captions: the B captions; equal captions divide the target probability equally.
    """
    is_same = torch.tensor(
        [[a == b for b in captions] for a in captions],
        dtype=image_embeddings.dtype,
        device=image_embeddings.device,
    )                                                                       # [B, B]
    targets = is_same / is_same.sum(dim=1, keepdim=True)
    logits = scale * image_embeddings @ caption_embeddings.T                # [B, B]
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


def compute_loss(model, images: torch.Tensor, captions: list[str]) -> torch.Tensor:
    """Return the contrastive loss of a batch of images uint8 [B, 3, H, W] and their captions."""
    return contrastive_loss(
        encode_images(model, images.to(model.logit_scale.device)),
        encode_captions(model, captions),
        model.logit_scale.exp(),
        captions,
    )


def compute_recall(
    image_embeddings: torch.Tensor,
    image_captions: list[str],
    caption_embeddings: torch.Tensor,
    captions: list[str],
    k: int = 1,
) -> float:
    """Return recall@k: the fraction of images whose caption is among the k nearest captions.

    image_embeddings, image_captions: [N, D], and the right caption of each of the N images.
    caption_embeddings, captions: [M, D], and the M captions to choose from.
    k: number of nearest captions that count; at most M are used.
    """
    similarity = image_embeddings @ caption_embeddings.T                    # [N, M]
    nearest = similarity.topk(min(k, len(captions)), dim=1).indices.tolist()
    correct = [
        caption in {captions[j] for j in indices}
        for caption, indices in zip(image_captions, nearest)
    ]
    return sum(correct) / len(correct)


@torch.no_grad()
def evaluate_retrieval(model, loader, k: int = 1) -> float:
    """Return recall@k of all images of a loader among all its distinct captions.

    loader: (images uint8 [B, 3, H, W], captions) batches, iterated over once.
    """
    model.eval()
    device = model.logit_scale.device
    image_embeddings = []
    image_captions = []
    for images, captions in loader:
        image_embeddings.append(encode_images(model, images.to(device)))
        image_captions += captions
    distinct = list(dict.fromkeys(image_captions))
    caption_embeddings = torch.cat([
        encode_captions(model, distinct[i:i + 64]) for i in range(0, len(distinct), 64)
    ])
    return compute_recall(
        torch.cat(image_embeddings), image_captions, caption_embeddings, distinct, k
    )


# ---------------------------------------------------------------- training


class FinetuneStep(NamedTuple):
    """One training step.

    index: number of the step, from 0.
    loss: the contrastive loss of its batch.
    model: the model that is being trained, in eval mode until the next step.
    """

    index: int
    loss: float
    model: torch.nn.Module


def finetune(
    model,
    loader,
    *,
    steps: int,
    learning_rate: float = 1e-5,
    weight_decay: float = 0.001,
    warmup: int = 20,
    clip: float = 1.0,
    checkpoint=None,
    save_every: int = 100,
) -> Iterator[FinetuneStep]:
    """Fine-tune a model for `steps` steps with AdamW and yield every step.

    There is no moving average of the weights; instead the learning rate falls to 0 along a cosine.

    model: from `load_cn_clip`; trained in place, on the device where it is.
    loader: (images uint8 [B, 3, H, W], captions) batches; it is iterated over repeatedly. Every
        other caption of a batch is a negative example, so larger batches teach more.
    learning_rate: the peak rate.
    weight_decay: of AdamW.
    warmup: steps over which the rate rises linearly to its peak; at most a tenth of the run.
    clip: maximum norm of the gradient.
    checkpoint: path of the training's state, written every `save_every` steps and at the end. If
        the file exists, the training resumes from it. The model alone is saved by `save_cn_clip`.

    Raises ValueError if the loader yields no batch, or steps < 1; FloatingPointError if the loss
    or its gradient is not finite.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), learning_rate, betas=(0.9, 0.98), eps=1e-6, weight_decay=weight_decay
    )
    optimizers = [(optimizer, learning_rate)]
    with training_lock(checkpoint):
        clock = TrainingClock(steps)
        if checkpoint is not None and Path(checkpoint).exists():
            saved = load_checkpoint(checkpoint, model.logit_scale.device)
            load_weights(model, saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            clock.start(saved["index"])

        batches = infinite_batches(loader, clock.index)
        while clock.progress < 1:
            # The loss.
            images, captions, _ = unpack_batch(next(batches))
            model.train()
            loss = compute_loss(model, images, captions)

            # The optimizer step, with linear warm-up and cosine decay of the learning rate.
            cosine = (1 + math.cos(math.pi * clock.progress)) / 2
            set_learning_rates(optimizers, cosine * clock.lr_multiplier(warmup, decay=0))
            loss = descend(loss, list(model.parameters()), optimizers, clip, clock.index)
            with torch.no_grad():
                model.logit_scale.clamp_(0, MAX_LOG_SCALE)

            # Save, and yield the step.
            clock.tick(len(images))
            if checkpoint is not None and (clock.index % save_every == 0 or clock.progress == 1):
                state = {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "index": clock.index,
                }
                save_checkpoint(checkpoint, state)
            yield FinetuneStep(clock.index - 1, loss, model.eval())

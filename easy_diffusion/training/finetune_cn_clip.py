"""Teach Chinese CLIP one's own dishes: pictures and captions of one dish near each other, others apart.

With I_i and T_j the vectors of picture i and caption j, of length one, and s the inverse temperature, the symmetric contrastive loss is

    loss = ½ (mean_i -log softmax_j(s I_i · T_j) at j = i  +  mean_j -log softmax_i(s I_i · T_j) at i = j)

(Radford et al., "Learning Transferable Visual Models", 2021, figure 3). In a batch of dishes the same name may come twice; then both
pictures are right answers for it, and share the target. How good it is tells retrieval: for how many pictures the right name, out of all
names, is the nearest. What comes out is a checkpoint that cn_clip's own `load_from_name` and text.py's CnClipEncoder read. The file needs
torch, torchvision and cn_clip and, beside it, batches.py and checkpoint.py.

>>> vectors = torch.nn.functional.normalize(torch.eye(3), dim=-1)
>>> bool(contrastive_loss(vectors, vectors, torch.tensor(100.0), ["番茄汤", "土豆丝", "炒面"]).abs() < 1e-6)
True
>>> recall(vectors, ["番茄汤", "土豆丝", "炒面"], vectors, ["番茄汤", "土豆丝", "炒面"])
1.0
"""

import contextlib
import io
import json
import math
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..files import atomic_path
from ..networks.weights_io import load_weights
from .checkpoint import load_checkpoint, save_checkpoint
from .data_loader import infinite_batches

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)       # of CLIP's training pictures


class FinetuneStep(NamedTuple):
    """One step: its number, its loss, and the model, which goes on learning."""

    index: int
    loss: float
    model: torch.nn.Module


def load_cn_clip(path, vision: str = "ViT-B-16", text: str = "RoBERTa-wwm-ext-base-chinese") -> torch.nn.Module:
    """cn_clip's whole model, in eval mode, float32, with `input_resolution`, of a checkpoint of these two towers.

    Raises FileNotFoundError, or ValueError for a damaged file and for one of other towers."""
    from cn_clip.clip.utils import create_model
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{path} is damaged, or holds more than tensors: {error}") from error
    state = {name.removeprefix("module."): tensor for name, tensor in state.get("state_dict", state).items()}
    state = {name: tensor for name, tensor in state.items() if "bert.pooler" not in name}
    with contextlib.redirect_stdout(io.StringIO()):                         # it tells its configuration
        model = create_model(f"{vision}@{text}").float()
    load_weights(model, state)
    import cn_clip.clip
    configuration = Path(cn_clip.clip.__file__).parent / "model_configs" / f"{vision}.json"
    model.input_resolution = json.loads(configuration.read_text())["image_resolution"]
    return model.eval()


def save_cn_clip(path, model, step: int = 0) -> None:
    """Write a model with the names of cn_clip's training, in half precision, to which `load_from_name` rounds it anyway."""
    state = {f"module.{name}": (tensor.half() if tensor.is_floating_point() else tensor).detach().cpu()
             for name, tensor in model.state_dict().items()}
    with atomic_path(path) as beside:
        torch.save({"epoch": 0, "step": step, "name": Path(path).stem, "state_dict": state}, beside)


def encode_images(model, pictures: torch.Tensor) -> torch.Tensor:
    """Pictures uint8 [B, 3, H, W] of any size → vectors of length one, [B, D]."""
    pictures = F.interpolate(pictures.float() / 255, (model.input_resolution,) * 2, mode="bicubic", antialias=True, align_corners=False)
    mean, deviation = (torch.tensor(values, device=pictures.device).view(3, 1, 1) for values in (MEAN, STD))
    return F.normalize(model.encode_image((pictures.clamp(0, 1) - mean) / deviation), dim=-1)


def encode_captions(model, captions: list[str]) -> torch.Tensor:
    """Captions → vectors of length one, [B, D]."""
    from cn_clip.clip import tokenize
    return F.normalize(model.encode_text(tokenize(captions).to(model.logit_scale.device)), dim=-1)


def contrastive_loss(pictures: torch.Tensor, texts: torch.Tensor, scale: torch.Tensor, captions: list[str]) -> torch.Tensor:
    """The symmetric loss of vectors [B, D] each; captions that are the same share their targets."""
    same = torch.tensor([[a == b for b in captions] for a in captions], dtype=pictures.dtype, device=pictures.device)       # [B, B]
    targets, scores = same / same.sum(dim=1, keepdim=True), scale * pictures @ texts.T
    return (F.cross_entropy(scores, targets) + F.cross_entropy(scores.T, targets)) / 2


def compute_recall(pictures: torch.Tensor, names: list[str], texts: torch.Tensor, captions: list[str], among: int = 1) -> float:
    """For which share of the pictures [N, D] with their names the right caption is among the nearest of texts [M, D]."""
    nearest = (pictures @ texts.T).topk(min(among, len(captions)), dim=1).indices.tolist()
    return sum(name in {captions[j] for j in row} for name, row in zip(names, nearest)) / len(names)


@torch.no_grad()
def evaluate_retrieval(model, loader, among: int = 1) -> float:
    """`recall` of all pictures of a loader, (uint8 [B, 3, H, W], captions), among all its distinct captions."""
    model.eval()
    device, vectors, names = model.logit_scale.device, [], []
    for pictures, captions in loader:
        vectors.append(encode_images(model, pictures.to(device)))
        names += captions
    distinct = list(dict.fromkeys(names))
    texts = torch.cat([encode_captions(model, distinct[i:i + 64]) for i in range(0, len(distinct), 64)])
    return compute_recall(torch.cat(vectors), names, texts, distinct, among)


def finetune(model, loader, *, steps: int, learning_rate: float = 1e-5, weight_decay: float = 0.001, warmup: int = 20,
             clip: float = 1.0, checkpoint=None, save_every: int = 100) -> Iterator[FinetuneStep]:
    """Fine-tune for `steps` steps; yields every step. There is no moving average: the rate falls to zero along a cosine instead.

    loader gives (pictures uint8 [B, 3, H, W], captions), again and again; the more captions a batch has, the more it teaches.
    checkpoint: a path for the run's state, written every save_every steps and at the end; if it is there, the run goes on from it (the
    model itself is written by `save_cn_clip`). Raises ValueError for an empty loader, FloatingPointError for a loss that is not finite.
    """
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, betas=(0.9, 0.98), eps=1e-6, weight_decay=weight_decay)
    device, first = model.logit_scale.device, 0
    if checkpoint is not None and Path(checkpoint).exists():
        saved = load_checkpoint(checkpoint, device)
        load_weights(model, saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["index"]
    for index, (pictures, captions) in zip(range(first, steps), infinite_batches(loader, first)):
        model.train()
        loss = contrastive_loss(encode_images(model, pictures.to(device)), encode_captions(model, list(captions)),
                                model.logit_scale.exp(), list(captions))
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss.item()} at step {index}; a lower learning_rate than {learning_rate} may help")
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1, (index + 1) / max(warmup, 1)) * (1 + math.cos(math.pi * index / steps)) / 2
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, 4.6052)                             # s is at most 100, as in CLIP's training
        if checkpoint is not None and ((index + 1) % save_every == 0 or index + 1 == steps):
            save_checkpoint(checkpoint, {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "index": index + 1})
        yield FinetuneStep(index, loss.item(), model.eval())

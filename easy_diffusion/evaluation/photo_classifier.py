"""A classifier of photographs, distances between sets of them, and a check for copies.

Photographs are compared by features z, vectors of D values of a network that was trained on
ImageNet, ImageFeatures in networks/image_features.py. Three questions are asked of samples:

    Does it show its caption?   A linear probe, softmax(W z + b), is trained on the features of real
                                photographs. The top-k accuracy is the fraction of samples whose
                                caption is among the k likeliest.
    Do they look real?          metrics.py's kernel and Fréchet distance on the features. FID is the
                                same formula on the features of another network, InceptionV3, so
                                the values cannot be compared with published ones.
    Is it a copy?               The distance 1 - cos(z, z') to the nearest training photograph,
                                beside that of photographs that the training has not seen. A sample
                                that is nearer than nearly all of those may be a copy.

The file needs torch and tqdm and, beside it, metrics.py. ImageFeatures is a network for the
features.

>>> features = torch.randn(640, 8, generator=torch.Generator().manual_seed(0))
>>> labels = (features[:, 0] > 0).long()
>>> probe = train_linear_probe(features, labels, classes=2)
>>> top_k_accuracy(probe(features), labels, k=1) > 0.9
True
>>> distance, index = nearest_neighbours(features[:3], features)
>>> index.tolist(), distance.abs().max() < 1e-5
([0, 1, 2], tensor(True))
"""

import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from .metrics import frechet_distance, kernel_distance

BATCH_SIZE = 64                         # images whose features are computed at once


def compute_features(network, images: torch.Tensor, show_progress: bool = False) -> torch.Tensor:
    """Return the features of images uint8 [N, 3, H, W], float32 [N, D], on the CPU.

    network: maps such images to features, see ImageFeatures.
    """
    batches = images.split(BATCH_SIZE)
    batches = tqdm(batches, desc="features", disable=not show_progress, leave=False)
    return torch.cat([network(batch).float().cpu() for batch in batches])


class LinearProbe(nn.Module):
    """The logits W (z - mean) / std + b of features z [N, D], [N, classes].

    mean and std are those of the features that it is trained on; each is [D]. W and b begin at 0.
    """

    def __init__(self, features: torch.Tensor, classes: int):
        super().__init__()
        self.register_buffer("mean", features.mean(dim=0))
        self.register_buffer("std", features.std(dim=0) + 1e-6)
        self.linear = nn.Linear(features.shape[1], classes)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.linear((features - self.mean) / self.std)


def train_linear_probe(
    features: torch.Tensor,
    labels: torch.Tensor,
    classes: int,
    epochs: int = 120,
    dropout: float = 0.5,
    weight_decay: float = 2.0,
    seed: int = 0,
) -> LinearProbe:
    """Train a linear probe on features; it takes seconds.

    With thousands of features and few photographs a linear layer can memorise them all. Three
    things work against it: dropout of the features, weight decay, and label smoothing of 0.1.

    features: [N, D]; several views of a photograph (flipped, cropped) may be among them.
    labels: int64 [N], 0 … classes - 1; else ValueError.
    weight_decay: of AdamW, whose learning rate falls from 1e-3 to 0 along a cosine.
    """
    if len(features) != len(labels):
        raise ValueError(f"{len(features)} features, but {len(labels)} labels")
    if not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(
            f"labels must be from 0 to {classes - 1}, "
            f"not from {int(labels.min())} to {int(labels.max())}"
        )
    generator = torch.Generator().manual_seed(seed)
    probe = LinearProbe(features, classes)
    optimizer = torch.optim.AdamW(probe.parameters(), 1e-3, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    standardised = (features - probe.mean) / probe.std
    for _ in range(epochs):
        for rows in torch.randperm(len(features), generator=generator).split(BATCH_SIZE):
            kept = torch.rand(len(rows), features.shape[1], generator=generator) >= dropout
            logits = probe.linear(standardised[rows] * kept / (1 - dropout))
            loss = F.cross_entropy(logits, labels[rows], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    return probe.requires_grad_(False)


def top_k_accuracy(logits: torch.Tensor, labels: torch.Tensor, k: int) -> float:
    """Return the fraction of rows whose label is among the k largest logits, 0 to 1.

    logits: [N, classes]. labels: int64 [N].
    """
    top = logits.topk(min(k, logits.shape[1]), dim=1).indices               # [N, k]
    return float((top == labels[:, None]).any(dim=1).float().mean())


# ---------------------------------------------------------------- copies


def nearest_neighbours(
    features: torch.Tensor, reference: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the distance 1 - cos to the nearest reference and its index, both [N].

    features: [N, D]. reference: [M, D].
    """
    cosine = F.normalize(features, dim=1) @ F.normalize(reference, dim=1).T  # [N, M]
    largest, index = cosine.max(dim=1)
    return 1 - largest, index


def copied_fraction(
    samples: torch.Tensor, training: torch.Tensor, unseen: torch.Tensor, quantile: float = 0.01
) -> tuple[float, float]:
    """Return the fraction of samples that are suspected copies, and the distance below which.

    The threshold is a quantile of the distances of unseen photographs to their nearest training
    photograph. Samples that are as new as photographs are nearer in a fraction of about `quantile`.

    samples, training, unseen: features [N, D], [M, D], [K, D].
    """
    distances, _ = nearest_neighbours(samples, training)
    unseen_distances, _ = nearest_neighbours(unseen, training)
    threshold = float(unseen_distances.quantile(quantile))
    return float((distances < threshold).float().mean()), threshold


# ---------------------------------------------------------------- all of them


class PhotoMetrics:
    """Judges samples by training photographs, unseen photographs and a linear probe.

    network: maps images uint8 [B, 3, H, W] to features, see ImageFeatures.
    training, unseen: (features [N, D], names) of photographs that the diffusion network was trained
        on, several views of each if there are, and of photographs that it has not seen.
    """

    def __init__(self, network, training: tuple, unseen: tuple):
        self.network = network
        self.training, self.training_names = training
        self.unseen, self.unseen_names = unseen
        self.names = sorted(set(self.training_names))
        self.probe = train_linear_probe(
            self.training, self._labels(self.training_names), len(self.names)
        )

    def _labels(self, names: list[str]) -> torch.Tensor:
        unknown = sorted(set(names) - set(self.names))
        if unknown:
            raise ValueError(f"no training photograph is named {', '.join(unknown)}")
        return torch.tensor([self.names.index(name) for name in names])

    def classify(self, images: torch.Tensor) -> list[str]:
        """Return the likeliest name for each image uint8 [N, 3, H, W]."""
        logits = self.probe(compute_features(self.network, images))
        return [self.names[i] for i in logits.argmax(dim=1).tolist()]

    def accuracy(self, images: torch.Tensor, names: list[str], k: int = 1) -> float:
        """Return the top-k accuracy for images uint8 [N, 3, H, W] with these names, 0 to 1."""
        logits = self.probe(compute_features(self.network, images))
        return top_k_accuracy(logits, self._labels(names), k)

    def measure(self, samples: torch.Tensor, names: list[str]) -> dict[str, float]:
        """Return accuracies, distances and the fraction of copies of samples uint8 [N, 3, H, W].

        "top1", "top5": of the names that the samples were asked for. "kernel_distance" and
        "frechet_distance": to N training photographs of the same names, chosen at random.
        "copied_fraction": see `copied_fraction`, with the threshold "copy_distance".

        Raises ValueError for a name that no training photograph has.
        """
        features = compute_features(self.network, samples)
        labels = self._labels(names)
        logits = self.probe(features)
        real = self.training[self._choose_photographs(names)]               # [N, D]
        copied, threshold = copied_fraction(features, self.training, self.unseen)
        return {
            "top1": top_k_accuracy(logits, labels, 1),
            "top5": top_k_accuracy(logits, labels, 5),
            "kernel_distance": kernel_distance(features, real)[0],
            "frechet_distance": frechet_distance(features, real),
            "copied_fraction": copied,
            "copy_distance": threshold,
        }

    def _choose_photographs(self, names: list[str]) -> list[int]:
        """For each name the index of a training photograph; of one name all are used in turn."""
        generator = torch.Generator().manual_seed(0)
        rows = {name: [] for name in self.names}
        for i in torch.randperm(len(self.training), generator=generator).tolist():
            rows[self.training_names[i]].append(i)
        counts = dict.fromkeys(self.names, 0)
        chosen = []
        for name in names:
            chosen.append(rows[name][counts[name] % len(rows[name])])
            counts[name] += 1
        return chosen

"""Fine-tuning cn_clip, with random weights.

The architecture is the smallest that cn_clip has: RN50 with a text encoder of three layers.
"""

import contextlib
import io

import pytest
import torch
from cn_clip.clip import load_from_name
from cn_clip.clip.utils import create_model, image_transform
from PIL import Image
from torch.nn.functional import cross_entropy, normalize

from datasets.dishes import Dishes
from easy_diffusion.networks.text_encoder import CnClipEncoder
from easy_diffusion.training.finetune_cn_clip import (
    compute_recall,
    contrastive_loss,
    encode_captions,
    encode_images,
    evaluate_retrieval,
    finetune,
    load_cn_clip,
    save_cn_clip,
)

ENCODERS = dict(vision="RN50", text="RBT3-chinese")


@pytest.fixture(scope="module")
def cn_clip_file(tmp_path_factory):
    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()):
        model = create_model("RN50@RBT3-chinese").float()
    path = tmp_path_factory.mktemp("clip") / "clip_cn_rn50.pt"
    save_cn_clip(path, model)
    return path


def test_the_loss_is_the_published_one_if_all_captions_differ():
    torch.manual_seed(0)
    images = normalize(torch.randn(5, 8), dim=-1)
    captions = normalize(torch.randn(5, 8), dim=-1)
    logits = 7.0 * images @ captions.T
    targets = torch.arange(5)
    expected = (cross_entropy(logits, targets) + cross_entropy(logits.T, targets)) / 2
    loss = contrastive_loss(images, captions, torch.tensor(7.0), list("甲乙丙丁戊"))
    torch.testing.assert_close(loss, expected)


def test_two_images_with_the_same_caption_are_no_negatives_of_each_other():
    """They share their target, and the loss grows if their embeddings differ."""
    captions = ["汤", "汤", "面"]
    scale = torch.tensor(100.0)
    equal = normalize(torch.tensor([[1.0, 0], [1, 0], [0, 1]]), dim=-1)
    loss_equal = contrastive_loss(equal, equal, scale, captions)
    entropy_of_targets = 2 / 3 * torch.log(torch.tensor(2.0)).item()
    assert float(loss_equal) == pytest.approx(entropy_of_targets, abs=1e-6)
    apart = normalize(torch.tensor([[1.0, 0.3], [1, -0.3], [0, 1]]), dim=-1)
    assert contrastive_loss(apart, apart, scale, captions) > 5 * loss_equal


def test_recall_counts_the_images_whose_caption_is_among_the_k_nearest():
    images = torch.eye(4)[:3]
    captions = torch.tensor([[0.0, 1, 0, 0], [1, 0.5, 0, 0], [0.1, 0, 1, 0]])
    names = ["甲", "乙", "丙"]
    assert compute_recall(images, names, captions, names) == pytest.approx(1 / 3)
    assert compute_recall(images, names, captions, names, k=2) == pytest.approx(2 / 3)
    assert compute_recall(images, names, captions, names, k=9) == 1


# Pillow, which resizes for cn_clip, rounds the pixels to bytes: hence the larger tolerance.
@pytest.mark.parametrize("side, tolerance", [(224, 1e-4), (100, 3e-3), (400, 3e-3)])
def test_embeddings_equal_those_of_cn_clip(cn_clip_file, side, tolerance):
    model = load_cn_clip(cn_clip_file, **ENCODERS)
    with contextlib.redirect_stdout(io.StringIO()):
        reference, _ = load_from_name(str(cn_clip_file), "cpu", None, "RN50", "RBT3-chinese", 224)
    reference.eval()
    assert model.input_resolution == 224
    image, caption = Dishes(1, side)[0]
    pil_image = Image.fromarray(image.permute(1, 2, 0).numpy())
    with torch.no_grad():
        image_embedding = encode_images(model, image[None])
        expected = reference.encode_image(image_transform(224)(pil_image)[None])
        caption_embedding = encode_captions(model, [caption])
    torch.testing.assert_close(
        image_embedding, normalize(expected, dim=-1), rtol=0, atol=tolerance
    )
    encoder = CnClipEncoder(cn_clip_file)                       # has the same text encoder
    expected = encoder.pooled(encoder([caption])[0])
    torch.testing.assert_close(caption_embedding, normalize(expected, dim=-1), rtol=0, atol=1e-5)


def test_it_learns_and_resumes_and_the_text_encoder_loads_the_result(cn_clip_file, tmp_path):
    images, captions = zip(*[Dishes(3, 64)[i] for i in range(3)])
    loader = [(torch.stack(images), list(captions))]

    def run_training(steps, checkpoint=None, stop_after=None):
        model = load_cn_clip(cn_clip_file, **ENCODERS)
        for layer in model.modules():
            if isinstance(layer, torch.nn.Dropout):
                layer.p = 0.0                                   # so that two runs can be compared
        losses = []
        training = finetune(
            model,
            loader,
            steps=steps,
            learning_rate=3e-5,
            warmup=1,
            checkpoint=checkpoint,
            save_every=2,
        )
        for step in training:
            losses.append(step.loss)
            if step.index == stop_after:
                break
        return model, losses

    uninterrupted, losses = run_training(4)
    assert len(losses) == 4
    assert losses[-1] < losses[0]

    # Interrupted after three steps; the last checkpoint is of the second one.
    run_training(4, tmp_path / "run.safetensors", stop_after=2)
    resumed, last_losses = run_training(4, tmp_path / "run.safetensors")
    assert last_losses == pytest.approx(losses[2:], rel=1e-5)
    for name, tensor in uninterrupted.state_dict().items():
        torch.testing.assert_close(
            resumed.state_dict()[name], tensor, rtol=0, atol=1e-6, msg=name
        )
    assert evaluate_retrieval(resumed, loader) == evaluate_retrieval(uninterrupted, loader)

    save_cn_clip(tmp_path / "tuned.pt", resumed, step=4)
    original_fingerprint = CnClipEncoder(cn_clip_file).fingerprint()
    assert CnClipEncoder(tmp_path / "tuned.pt").fingerprint() != original_fingerprint
    assert not list(tmp_path.glob("*.writing"))


def test_wrong_files_and_empty_loaders_are_named(cn_clip_file, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_cn_clip(tmp_path / "nowhere.pt")
    with pytest.raises(ValueError, match="unknown|missing"):
        load_cn_clip(cn_clip_file, vision="RN50", text="RoBERTa-wwm-ext-base-chinese")
    (tmp_path / "truncated.pt").write_bytes(cn_clip_file.read_bytes()[:9999])
    with pytest.raises(ValueError, match="truncated.pt is damaged"):
        load_cn_clip(tmp_path / "truncated.pt")
    with pytest.raises(ValueError, match="no batch"):
        next(finetune(load_cn_clip(cn_clip_file, **ENCODERS), [], steps=1))


class FixedEmbeddings(torch.nn.Module):
    """A model in which each image has the embedding of its own caption or of the other one."""

    def __init__(self, log_scale, own):
        super().__init__()
        self.input_resolution = 8
        self.logit_scale = torch.nn.Parameter(torch.tensor(log_scale))
        self.images = torch.tensor([[1.0, 0.0], [1.0, 0.1]])     # close: the loss is not 0
        self.captions = self.images if own else self.images.flip(0)

    def encode_image(self, images):
        return self.images

    def encode_text(self, tokens):
        return self.captions


@pytest.mark.parametrize("log_scale, own, limit", [(4.5, True, 4.6052), (0.1, False, 0.0)])
def test_the_inverse_temperature_stays_between_1_and_100(log_scale, own, limit):
    """Without limits it would grow for embeddings that fit, and fall for others."""
    model = FixedEmbeddings(log_scale, own)
    loader = [(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), ["汤", "面"])]
    for _ in finetune(model, loader, steps=4, learning_rate=1.0, warmup=0):
        pass
    assert model.logit_scale.item() == pytest.approx(limit, abs=1e-6)


def test_a_large_image_is_resized_as_cn_clip_does():
    """A chessboard of single pixels becomes grey; without antialiasing it would stay a pattern."""
    class Pixels(torch.nn.Module):
        input_resolution = 16

        def encode_image(self, images):
            return images.flatten(1)

    y, x = torch.meshgrid(torch.arange(72), torch.arange(72), indexing="ij")
    image = (255 * ((x + y) % 2)).to(torch.uint8).expand(3, 72, 72)
    expected = image_transform(16)(Image.fromarray(image.permute(1, 2, 0).numpy()))
    torch.testing.assert_close(
        encode_images(Pixels(), image[None])[0],
        normalize(expected.flatten(), dim=0),
        rtol=0,
        atol=3e-3,                          # Pillow rounds to bytes
    )

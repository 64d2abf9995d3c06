"""Fine-tuning cn_clip, on the smallest architecture that is published (RN50 with a text tower of three layers), random weights."""

import contextlib
import io

import pytest
import torch
from cn_clip.clip import load_from_name
from cn_clip.clip.utils import create_model, image_transform
from PIL import Image

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

TOWERS = dict(vision="RN50", text="RBT3-chinese")


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()):
        model = create_model("RN50@RBT3-chinese").float()
    path = tmp_path_factory.mktemp("clip") / "clip_cn_rn50.pt"
    save_cn_clip(path, model)
    return path


def test_the_loss_is_the_published_one_where_all_captions_differ():
    torch.manual_seed(0)
    pictures, texts = (torch.nn.functional.normalize(torch.randn(5, 8), dim=-1) for _ in range(2))
    scores, own = 7.0 * pictures @ texts.T, torch.arange(5)
    expected = (torch.nn.functional.cross_entropy(scores, own) + torch.nn.functional.cross_entropy(scores.T, own)) / 2
    torch.testing.assert_close(contrastive_loss(pictures, texts, torch.tensor(7.0), list("甲乙丙丁戊")), expected)


def test_the_same_dish_twice_is_no_wrong_answer():
    """Two pictures of one dish share their target: they belong to the same place, and the loss grows where they are moved apart."""
    vectors = torch.nn.functional.normalize(torch.tensor([[1.0, 0], [1, 0], [0, 1]]), dim=-1)
    twice = contrastive_loss(vectors, vectors, torch.tensor(100.0), ["汤", "汤", "面"])
    assert float(twice) == pytest.approx(2 / 3 * torch.log(torch.tensor(2.0)).item(), abs=1e-6)      # the entropy of their shared target
    apart = torch.nn.functional.normalize(torch.tensor([[1.0, 0.3], [1, -0.3], [0, 1]]), dim=-1)
    assert contrastive_loss(apart, apart, torch.tensor(100.0), ["汤", "汤", "面"]) > 5 * twice


def test_recall_counts_right_names_among_the_nearest():
    pictures, texts = torch.eye(4)[:3], torch.tensor([[0.0, 1, 0, 0], [1, 0.5, 0, 0], [0.1, 0, 1, 0]])
    assert compute_recall(pictures, ["甲", "乙", "丙"], texts, ["甲", "乙", "丙"]) == pytest.approx(1 / 3)
    assert compute_recall(pictures, ["甲", "乙", "丙"], texts, ["甲", "乙", "丙"], among=2) == pytest.approx(1 / 3 + 1 / 3)
    assert compute_recall(pictures, ["甲", "乙", "丙"], texts, ["甲", "乙", "丙"], among=9) == 1


@pytest.mark.parametrize("side, within", [(224, 1e-4), (100, 3e-3), (400, 3e-3)])       # Pillow, which scales for cn_clip, rounds to bytes
def test_vectors_are_cn_clips(published, side, within):
    model = load_cn_clip(published, **TOWERS)
    with contextlib.redirect_stdout(io.StringIO()):
        theirs, _ = load_from_name(str(published), "cpu", None, "RN50", "RBT3-chinese", 224)
    theirs.eval()
    assert model.input_resolution == 224
    picture, name = Dishes(1, side)[0]
    with torch.no_grad():
        own = encode_images(model, picture[None])
        peer = theirs.encode_image(image_transform(224)(Image.fromarray(picture.permute(1, 2, 0).numpy()))[None])
        texts = encode_captions(model, [name])
    torch.testing.assert_close(own, torch.nn.functional.normalize(peer, dim=-1), rtol=0, atol=within)
    ours = CnClipEncoder(published)                                         # what text.py reads is the same tower
    torch.testing.assert_close(texts, torch.nn.functional.normalize(ours.pooled(ours([name])[0]), dim=-1), rtol=0, atol=1e-5)


def test_it_learns_and_resumes_and_text_py_reads_the_result(published, tmp_path):
    dishes = [Dishes(3, 64)[i] for i in range(3)]
    batch = [(torch.stack([picture for picture, _ in dishes]), [name for _, name in dishes])]
    def run(steps, checkpoint=None, stop=None):
        model, losses = load_cn_clip(published, **TOWERS), []
        for layer in model.modules():
            if isinstance(layer, torch.nn.Dropout):
                layer.p = 0.0                                               # so that two runs can be compared
        for step in finetune(model, batch, steps=steps, learning_rate=3e-5, warmup=1, checkpoint=checkpoint, save_every=2):
            losses.append(step.loss)
            if step.index == stop:
                break
        return model, losses
    whole, losses = run(4)
    assert losses[-1] < losses[0] and len(losses) == 4
    run(4, tmp_path / "run.safetensors", stop=2)                            # saved after the second step, broken off after the third
    resumed, rest = run(4, tmp_path / "run.safetensors")
    assert rest == pytest.approx(losses[2:], rel=1e-5)
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], tensor, rtol=0, atol=1e-6, msg=name)
    assert evaluate_retrieval(resumed, batch) == evaluate_retrieval(whole, batch)
    save_cn_clip(tmp_path / "tuned.pt", resumed, step=4)
    assert CnClipEncoder(tmp_path / "tuned.pt").fingerprint() != CnClipEncoder(published).fingerprint()
    assert not list(tmp_path.glob("*.writing"))


def test_wrong_files_and_loaders_are_named(published, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_cn_clip(tmp_path / "nowhere.pt")
    with pytest.raises(ValueError, match="unknown|missing"):
        load_cn_clip(published, vision="RN50", text="RoBERTa-wwm-ext-base-chinese")
    (tmp_path / "cut.pt").write_bytes(published.read_bytes()[:9999])
    with pytest.raises(ValueError, match="cut.pt is damaged"):
        load_cn_clip(tmp_path / "cut.pt")
    with pytest.raises(ValueError, match="no batch"):
        next(finetune(load_cn_clip(published, **TOWERS), [], steps=1))

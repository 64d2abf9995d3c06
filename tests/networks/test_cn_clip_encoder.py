"""CnClipEncoder against cn_clip and transformers.

The weights are random; the architectures and the file formats are the published ones.
"""

import contextlib
import io

import numpy as np
import pytest
import torch
from cn_clip.clip import load_from_name, tokenize
from cn_clip.clip.utils import create_model
from safetensors.torch import save_file
from transformers import ChineseCLIPConfig, ChineseCLIPModel

from easy_diffusion.networks.text_encoder import CnClipEncoder

CAPTIONS = ["番茄炒鸡蛋", "", "小鸡炖蘑菇，配一碗米饭"]


def without_output(function, *arguments, **options):
    """Call a function and discard what it prints."""
    with contextlib.redirect_stdout(io.StringIO()):
        return function(*arguments, **options)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A file of ViT-B-16, 188 M random weights, as the training of cn_clip saves it."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("cn_clip") / "clip_cn_vit-b-16.pt"
    model = without_output(create_model, "ViT-B-16@RoBERTa-wwm-ext-base-chinese").float()
    for parameter in model.bert.parameters():
        torch.nn.init.normal_(parameter, std=0.05)  # in float32, which cn_clip rounds to float16
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    assert any(
        not torch.equal(tensor, tensor.half().float())
        for tensor in state.values()
        if tensor.is_floating_point()
    )
    torch.save({"epoch": 3, "step": 40, "name": "dishes", "state_dict": state}, path)
    return path


@pytest.fixture(scope="module")
def small():
    """The tensors of RN50's text tower, the smallest that is published: three layers."""
    torch.manual_seed(0)
    model = without_output(create_model, "RN50@RBT3-chinese")
    return {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not name.startswith("visual")
    }


def test_the_context_equals_cn_clips(base):
    encoder = CnClipEncoder(base)
    peer, *_ = without_output(
        load_from_name, str(base), "cpu", None, "ViT-B-16", "RoBERTa-wwm-ext-base-chinese", 224
    )
    peer.eval()
    tokens = tokenize(CAPTIONS)
    context, mask = encoder(CAPTIONS)
    with torch.no_grad():
        expected = peer.bert(tokens, attention_mask=tokens.ne(0).float())[0]
        expected_pooled = peer.encode_text(tokens)
    assert context.shape == (3, 52, 768)
    assert encoder.dim == 768
    assert torch.equal(mask, tokens != 0)
    assert mask.sum(1).tolist() == [7, 2, 13]
    torch.testing.assert_close(context, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(encoder.pooled(context), expected_pooled, rtol=0, atol=1e-5)

    # The folder that holds the file
    from_folder = CnClipEncoder(base.parent)
    assert from_folder.fingerprint() == encoder.fingerprint()
    assert torch.equal(from_folder(CAPTIONS)[0], context)


def test_the_context_equals_transformers(base, tmp_path):
    # transformers' model with the same text tower
    vision = dict(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1
    )
    config = ChineseCLIPConfig(
        text_config={"vocab_size": 21128}, projection_dim=512, vision_config=vision
    )
    peer = ChineseCLIPModel(config).eval()
    state = torch.load(base, weights_only=True)["state_dict"]
    text_state = {
        name.removeprefix("module.bert."): tensor.float()
        for name, tensor in state.items()
        if name.startswith("module.bert.")
    }
    report = peer.text_model.load_state_dict(text_state, strict=False)
    assert not report.unexpected_keys
    assert all("pooler" in name or "_ids" in name for name in report.missing_keys)
    projection = state["module.text_projection"].float()
    peer.text_projection.weight.data = projection.T.contiguous()
    peer.save_pretrained(tmp_path)

    tokens = tokenize(CAPTIONS)
    with torch.no_grad():
        expected = peer.text_model(tokens, attention_mask=tokens.ne(0))[0]
    expected_pooled = peer.text_projection(expected[:, 0])
    encoder = CnClipEncoder(tmp_path)
    context, mask = encoder(CAPTIONS)
    torch.testing.assert_close(context[mask], expected[mask], rtol=0, atol=1e-4)
    torch.testing.assert_close(encoder.pooled(context), expected_pooled, rtol=0, atol=1e-4)


def test_it_is_frozen_and_in_eval_mode_unless_frozen_is_false(small, tmp_path):
    torch.save({"state_dict": small}, tmp_path / "clip.pt")
    frozen = CnClipEncoder(tmp_path / "clip.pt").train()
    context, _ = frozen(CAPTIONS)
    assert not context.requires_grad
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert torch.equal(context, frozen(CAPTIONS)[0])  # no dropout, though train() was called

    trainable = CnClipEncoder(tmp_path / "clip.pt", frozen=False)
    assert torch.equal(trainable(CAPTIONS)[0], context)
    trainable.train()
    trainable(CAPTIONS)[0].sum().backward()
    assert trainable.bert.embeddings.word_embeddings.weight.grad.abs().max() > 0
    assert not torch.equal(trainable(CAPTIONS)[0], context)


def test_fine_tuned_checkpoints_and_bare_weights_are_read(small, tmp_path):
    contents = {
        "tuned": {
            "epoch": 1,
            "state_dict": {f"module.{name}": tensor for name, tensor in small.items()},
            "optimizer": {"state": {0: {"step": torch.ones(1)}}},
        },
        "bare": small,
        "float": {name: tensor.float() for name, tensor in small.items()},
    }
    fingerprints = set()
    for name, content in contents.items():
        torch.save(content, tmp_path / f"{name}.pt")
        fingerprints.add(CnClipEncoder(tmp_path / f"{name}.pt").fingerprint())
    assert len(fingerprints) == 1
    changed = small | {"text_projection": small["text_projection"] + 1}
    torch.save(changed, tmp_path / "other.pt")
    assert CnClipEncoder(tmp_path / "other.pt").fingerprint() not in fingerprints


def test_captions_that_are_too_long_are_cut(small, tmp_path):
    torch.save(small, tmp_path / "clip.pt")
    context, mask = CnClipEncoder(tmp_path / "clip.pt")(["番" * 80])
    assert context.shape == (1, 52, 768)
    assert mask.all()
    with pytest.raises(TypeError, match="list of str"):
        CnClipEncoder(tmp_path / "clip.pt")("番茄")


def test_the_error_for_a_wrong_file_says_what_is_wrong(small, tmp_path):
    def assert_refused(error, message, content=None, name="clip.pt"):
        if content is not None:
            torch.save(content, tmp_path / name)
        with pytest.raises(error, match=message):
            CnClipEncoder(tmp_path / name)

    # No file
    assert_refused(FileNotFoundError, "neither a file nor a folder", name="missing.pt")
    assert_refused(FileNotFoundError, "it holds none", name="")

    # Files of something else
    two_tensors = {"a": torch.ones(1), "b": torch.ones(1)}
    message = "is no Chinese CLIP.*2 other tensors, such as a, b"
    assert_refused(ValueError, message, two_tensors)
    assert_refused(ValueError, "more than tensors", {"state_dict": small, "loss": np.float64(1)})

    # Tensors that are missing, unknown or of the wrong shape
    bias = "bert.encoder.layer.1.output.dense.bias"
    without_bias = {name: tensor for name, tensor in small.items() if name != bias}
    assert_refused(ValueError, f"missing: {bias}", without_bias)
    assert_refused(ValueError, "unknown: bert.extra", small | {"bert.extra": torch.ones(1)})
    position = "bert.embeddings.position_embeddings.weight"
    message = rf"shape of {position}: \(9, 768\), not \(512, 768\)"
    assert_refused(ValueError, message, small | {position: torch.ones(9, 768)})

    # Damaged files
    (tmp_path / "clip.pt").write_bytes((tmp_path / "clip.pt").read_bytes()[:5000])
    assert_refused(ValueError, "damaged")
    (tmp_path / "model.safetensors").write_bytes(b"no header")
    assert_refused(ValueError, "damaged", name="model.safetensors")
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    assert_refused(ValueError, "no Chinese CLIP", name="model.safetensors")


def test_the_error_for_a_failed_download_suggests_a_checkpoint(monkeypatch):
    def fail(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("cn_clip.clip.load_from_name", fail)
    message = "could not download or load ViT-B-16.*path to a checkpoint.*no network"
    with pytest.raises(RuntimeError, match=message):
        CnClipEncoder("ViT-B-16")


def test_a_published_name_is_loaded_by_cn_clip(base, monkeypatch):
    def load_local(name, device):
        return load_from_name(name, device, download_root=str(base.parent))

    monkeypatch.setattr("cn_clip.clip.load_from_name", load_local)
    assert CnClipEncoder("ViT-B-16").fingerprint() == CnClipEncoder(base).fingerprint()


def test_a_checkpoint_that_was_trained_with_flash_attention_is_converted(small, tmp_path):
    """Its layers have one tensor Wqkv in the place of query, key and value."""
    state = dict(small)
    for name in list(state):
        if ".query." in name:
            parts = [state.pop(name.replace("query", part)) for part in ("query", "key", "value")]
            state[name.replace("query", "Wqkv")] = torch.cat(parts)
    assert len(state) < len(small)
    torch.save(small, tmp_path / "plain.pt")
    torch.save(state, tmp_path / "flash.pt")
    plain, flash = (CnClipEncoder(tmp_path / f"{name}.pt") for name in ("plain", "flash"))
    assert torch.equal(flash(CAPTIONS)[0], plain(CAPTIONS)[0])

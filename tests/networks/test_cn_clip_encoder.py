"""CnClipEncoder against cn_clip and transformers, with random weights of the real architecture in the real file formats."""

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


def quietly(function, *arguments, **options):
    with contextlib.redirect_stdout(io.StringIO()):
        return function(*arguments, **options)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The published ViT-B-16's architecture, 188 M random weights, as cn_clip's training saves them."""
    torch.manual_seed(0)
    path, model = tmp_path_factory.mktemp("cn_clip") / "clip_cn_vit-b-16.pt", quietly(create_model, "ViT-B-16@RoBERTa-wwm-ext-base-chinese")
    for parameter in model.float().bert.parameters():
        torch.nn.init.normal_(parameter, std=0.05)                          # in single precision, which cn_clip rounds to half
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    assert any(not torch.equal(tensor, tensor.half().float()) for tensor in state.values() if tensor.is_floating_point())
    torch.save({"epoch": 3, "step": 40, "name": "dishes", "state_dict": state}, path)
    return path


@pytest.fixture(scope="module")
def small():
    """The text tower of RN50, the smallest that is published: three layers."""
    torch.manual_seed(0)
    model = quietly(create_model, "RN50@RBT3-chinese")
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("visual")}


def test_states_equal_cn_clips(base):
    ours, theirs = CnClipEncoder(base), quietly(load_from_name, str(base), "cpu", None, "ViT-B-16", "RoBERTa-wwm-ext-base-chinese", 224)[0]
    theirs.eval()
    tokens = tokenize(CAPTIONS)
    states, mask = ours(CAPTIONS)
    with torch.no_grad():
        expected = theirs.bert(tokens, attention_mask=tokens.ne(0).float())[0]
        pooled = theirs.encode_text(tokens)
    assert states.shape == (3, 52, 768) and ours.dim == 768 and torch.equal(mask, tokens != 0) and mask.sum(1).tolist() == [7, 2, 13]
    torch.testing.assert_close(states, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(ours.pooled(states), pooled, rtol=0, atol=1e-5)
    folder = CnClipEncoder(base.parent)                                     # the folder that holds it
    assert folder.fingerprint() == ours.fingerprint() and torch.equal(folder(CAPTIONS)[0], states)


def test_states_equal_transformers(base, tmp_path):
    config = ChineseCLIPConfig(text_config={"vocab_size": 21128}, projection_dim=512,
                               vision_config=dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1))
    peer, state = ChineseCLIPModel(config).eval(), torch.load(base, weights_only=True)["state_dict"]
    text = {name.removeprefix("module.bert."): tensor.float() for name, tensor in state.items() if name.startswith("module.bert.")}
    report = peer.text_model.load_state_dict(text, strict=False)
    assert not report.unexpected_keys and not [name for name in report.missing_keys if "pooler" not in name and "_ids" not in name]
    peer.text_projection.weight.data = state["module.text_projection"].float().T.contiguous()
    peer.save_pretrained(tmp_path)
    tokens = tokenize(CAPTIONS)
    with torch.no_grad():
        expected = peer.text_model(tokens, attention_mask=tokens.ne(0))[0]
    ours = CnClipEncoder(tmp_path)
    states, mask = ours(CAPTIONS)
    torch.testing.assert_close(states[mask], expected[mask], rtol=0, atol=1e-4)
    torch.testing.assert_close(ours.pooled(states), peer.text_projection(expected[:, 0]), rtol=0, atol=1e-4)


def test_it_is_frozen_and_awake_only_when_asked(small, tmp_path):
    torch.save({"state_dict": small}, tmp_path / "clip.pt")
    frozen = CnClipEncoder(tmp_path / "clip.pt").train()
    states, _ = frozen(CAPTIONS)
    assert not states.requires_grad and not any(p.requires_grad for p in frozen.parameters())
    assert torch.equal(states, frozen(CAPTIONS)[0])                         # no dropout, though train() was called
    free = CnClipEncoder(tmp_path / "clip.pt", frozen=False)
    assert torch.equal(free(CAPTIONS)[0], states)
    free.train()(CAPTIONS)[0].sum().backward()
    assert free.bert.embeddings.word_embeddings.weight.grad.abs().max() > 0 and not torch.equal(free(CAPTIONS)[0], states)


def test_fine_tuned_checkpoints_and_bare_weights_are_read(small, tmp_path):
    inside = {f"module.{name}": tensor for name, tensor in small.items()}
    training = {"epoch": 1, "state_dict": inside, "optimizer": {"state": {0: {"step": torch.ones(1)}}}}
    for name, content in (("tuned", training), ("bare", small), ("float", {n: t.float() for n, t in small.items()})):
        torch.save(content, tmp_path / f"{name}.pt")
    prints = {CnClipEncoder(tmp_path / f"{name}.pt").fingerprint() for name in ("tuned", "bare", "float")}
    assert len(prints) == 1
    torch.save(small | {"text_projection": small["text_projection"] + 1}, tmp_path / "other.pt")
    assert CnClipEncoder(tmp_path / "other.pt").fingerprint() not in prints


def test_captions_that_are_too_long_are_cut(small, tmp_path):
    torch.save(small, tmp_path / "clip.pt")
    states, mask = CnClipEncoder(tmp_path / "clip.pt")(["番" * 80])
    assert states.shape == (1, 52, 768) and mask.all()
    with pytest.raises(TypeError, match="list of str"):
        CnClipEncoder(tmp_path / "clip.pt")("番茄")


def test_wrong_files_say_what_is_wrong(small, tmp_path):
    def refused(kind, says, content=None, name="clip.pt"):
        if content is not None:
            torch.save(content, tmp_path / name)
        with pytest.raises(kind, match=says):
            CnClipEncoder(tmp_path / name)

    refused(FileNotFoundError, "neither a file nor a folder", name="nowhere.pt")
    refused(FileNotFoundError, "it holds none", name="")
    refused(ValueError, "is no Chinese CLIP.*2 other tensors, such as a, b", {"a": torch.ones(1), "b": torch.ones(1)})
    refused(ValueError, "more than tensors", {"state_dict": small, "loss": np.float64(1)})
    lacking = {name: tensor for name, tensor in small.items() if name != "bert.encoder.layer.1.output.dense.bias"}
    refused(ValueError, "missing: bert.encoder.layer.1.output.dense.bias", lacking)
    refused(ValueError, "unknown: bert.stranger", small | {"bert.stranger": torch.ones(1)})
    refused(ValueError, r"shape of bert.embeddings.position_embeddings.weight: \(9, 768\), not \(512, 768\)",
            small | {"bert.embeddings.position_embeddings.weight": torch.ones(9, 768)})
    (tmp_path / "clip.pt").write_bytes((tmp_path / "clip.pt").read_bytes()[:5000])
    refused(ValueError, "damaged")
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    refused(ValueError, "damaged", name="model.safetensors")
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    refused(ValueError, "no Chinese CLIP", name="model.safetensors")


def test_a_download_that_fails_says_what_else_one_can_do(monkeypatch):
    def unreachable(*_, **__):
        raise OSError("no network")
    monkeypatch.setattr("cn_clip.clip.load_from_name", unreachable)
    with pytest.raises(RuntimeError, match="could not download or load ViT-B-16.*path to a checkpoint.*no network"):
        CnClipEncoder("ViT-B-16")


def test_a_published_name_is_loaded_by_cn_clip(base, monkeypatch):
    original = load_from_name
    monkeypatch.setattr("cn_clip.clip.load_from_name", lambda name, device: original(name, device, download_root=str(base.parent)))
    assert CnClipEncoder("ViT-B-16").fingerprint() == CnClipEncoder(base).fingerprint()

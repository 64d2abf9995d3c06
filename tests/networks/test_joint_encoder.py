"""Encoders of pairs: the tokens of both parts, and a beat for each frame."""

import pytest
import torch

from easy_diffusion.networks.audio_encoder import AudioEncoder
from easy_diffusion.networks.joint_encoder import BeatEncoder, JointEncoder
from easy_diffusion.networks.text_encoder import CharacterEncoder


@torch.no_grad()
def test_two_encoders_are_joined():
    torch.manual_seed(0)
    encoder = AudioEncoder(dim=32).eval()
    text = CharacterEncoder("番茄鸡蛋", dim=32).eval()
    both = JointEncoder(encoder, text)
    sounds = [0.2 * torch.randn(4800), ""]
    context, mask = both(list(zip(sounds, ["番茄", "鸡蛋番茄"])))
    a, mask_a = encoder(sounds)
    b, mask_b = text(["番茄", "鸡蛋番茄"])
    assert torch.equal(context, torch.cat([a, b], dim=1))
    assert torch.equal(mask, torch.cat([mask_a, mask_b], dim=1))
    _, mask = both([both.uncond])
    assert mask.sum() == 2                      # the two start tokens
    with pytest.raises(ValueError, match="takes pairs, not '番茄炒鸡蛋'"):
        both(["番茄炒鸡蛋"])
    with pytest.raises(ValueError, match="32 and 16"):
        JointEncoder(encoder, CharacterEncoder("番茄", dim=16))


@torch.no_grad()
def test_beats_are_the_last_token_of_each_frame():
    text = CharacterEncoder("番茄鸡蛋", dim=32).eval()
    encoder = BeatEncoder(text)
    beats = torch.tensor([0.0, 1.0, 0.5, 0.0])
    context, mask = encoder([("番茄", beats), ("鸡蛋番茄", None)])
    assert context.shape == (2, 4, 6, 32) and mask.shape == (2, 4, 6)
    plain, plain_mask = text(["番茄", "鸡蛋番茄"])
    assert (context[:, :, :5] == plain[:, None]).all()
    assert (mask[:, :, :5] == plain_mask[:, None]).all()
    assert mask[0, :, 5].all() and not mask[1, :, 5].any()
    slope = context[0, 1, 5] - context[0, 0, 5]
    torch.testing.assert_close(context[0, 2, 5], context[0, 0, 5] + slope / 2)
    assert encoder([encoder.uncond])[0].shape == (1, 1, 32)
    with pytest.raises(ValueError, match=r"float tensor \[4\]"):
        encoder([("番茄", beats), ("番茄", beats[:3])])

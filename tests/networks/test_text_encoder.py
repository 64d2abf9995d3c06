import warnings

import pytest
import torch

from easy_diffusion.networks.text_encoder import CharacterEncoder


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return CharacterEncoder("番茄炒鸡蛋土豆汤", dim=32, max_length=8).eval()


def test_states_and_mask(encoder):
    states, mask = encoder(["番茄炒鸡蛋", "土豆汤", ""])
    assert states.shape == (3, 6, 32) and mask.dtype == torch.bool
    assert mask.sum(dim=1).tolist() == [6, 4, 1] and mask[:, 0].all()


def test_a_caption_means_the_same_alone_and_in_company(encoder):
    together, _ = encoder(["土豆汤", "番茄炒鸡蛋"])
    alone, _ = encoder(["土豆汤"])
    torch.testing.assert_close(together[0, :4], alone[0], rtol=0, atol=1e-5)


def test_a_character_means_something_else_beside_another(encoder):
    potato, soup = encoder(["土豆", "土汤"])[0]
    assert not torch.allclose(potato[1], soup[1], atol=1e-2)               # the same 土 at the same place


def test_an_unknown_character_is_named_once_and_still_encoded(encoder):
    with pytest.warns(UserWarning, match="鱼"):
        states, mask = encoder(["鱼汤"])
    assert torch.isfinite(states).all() and mask.sum() == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder(["鱼汤"])


def test_wrong_captions_are_refused(encoder):
    with pytest.raises(TypeError, match="list of str"):
        encoder("番茄")
    with pytest.raises(ValueError, match="at most 7 characters"):
        encoder(["番" * 8])

"""CharacterEncoder: shapes, mask, padding, context dependence, unknown characters and errors."""

import warnings

import pytest
import torch

from easy_diffusion.networks.text_encoder import CharacterEncoder


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return CharacterEncoder("番茄炒鸡蛋土豆汤", dim=32, max_length=8).eval()


def test_context_and_mask_have_a_start_token_and_one_token_a_character(encoder):
    context, mask = encoder(["番茄炒鸡蛋", "土豆汤", ""])
    assert context.shape == (3, 6, 32)
    assert mask.dtype == torch.bool
    assert mask.sum(dim=1).tolist() == [6, 4, 1]
    assert mask[:, 0].all()


def test_a_caption_has_the_same_context_alone_and_in_a_batch(encoder):
    batched, _ = encoder(["土豆汤", "番茄炒鸡蛋"])
    alone, _ = encoder(["土豆汤"])
    torch.testing.assert_close(batched[0, :4], alone[0], rtol=0, atol=1e-5)


def test_the_embedding_of_a_character_depends_on_its_neighbours(encoder):
    potato, soup = encoder(["土豆", "土汤"])[0]
    assert not torch.allclose(potato[1], soup[1], atol=1e-2)  # 土 at the same position


def test_the_unconditional_caption_is_the_start_token_alone(encoder):
    context, mask = encoder([encoder.uncond])
    assert context.shape == (1, 1, 32)
    assert mask.tolist() == [[True]]


def test_an_unknown_character_is_named_once_and_still_encoded(encoder):
    with pytest.warns(UserWarning, match="鱼"):
        context, mask = encoder(["鱼汤"])
    assert torch.isfinite(context).all()
    assert mask.sum() == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder(["鱼汤"])


def test_wrong_captions_are_refused(encoder):
    with pytest.raises(TypeError, match="list of str"):
        encoder("番茄")
    with pytest.raises(ValueError, match="at most 7 characters"):
        encoder(["番" * 8])


def test_labels_in_the_place_of_captions_are_named():
    """A dataset of torchvision gives integer labels."""
    encoder = CharacterEncoder("红黑", dim=32, layers=1)
    with pytest.raises(TypeError, match="a caption must be a str, not 3; labels need an encoder"):
        encoder([3, 1])


def test_token_ids_do_not_depend_on_the_order_of_the_characters():
    """A saved encoder is built again in another process, whose sets have another order."""
    for text in ("番茄炒鸡蛋土豆汤", "汤豆土蛋鸡炒茄番汤"):
        encoder = CharacterEncoder(text, dim=32, layers=1)
        assert encoder.characters == "土汤炒番茄蛋豆鸡"                    # by code point
        assert encoder.tokenize(["番茄汤"]).tolist() == [[1, 6, 7, 4]]


def test_an_encoder_that_learns_characters_encodes_the_old_ones_as_before():
    encoder = CharacterEncoder("番茄炒鸡蛋汤", dim=32, heads=2).eval()
    larger = encoder.with_characters("转动番").eval()
    captions = ["番茄汤", "", "鸡蛋"]
    assert all(map(torch.equal, larger(captions), encoder(captions)))
    assert set(larger.characters) == set("番茄炒鸡蛋汤转动")
    assert not torch.equal(larger(["转"])[0], larger(["动"])[0])
    assert CharacterEncoder(**larger.settings).characters == larger.characters

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.embeddings import get_timestep_embedding
from torch.autograd.graph import saved_tensors_hooks

pass
from easy_diffusion.diffusion.gaussian import GaussianDiffusion
from easy_diffusion.diffusion.guidance import batched_guidance, concat_contexts, guided
from easy_diffusion.diffusion.prediction import Denoiser, Prediction
from easy_diffusion.diffusion.schedule import NoiseSchedule
from easy_diffusion.networks import blocks
from easy_diffusion.networks.blocks import Attention, ResidualBlock, SpatialTransformer, timestep_embedding
from easy_diffusion.networks.stable_diffusion_weights import save_stable_diffusion
from easy_diffusion.networks.unet import UNet, masked_mean


def shaken(module):
    """The zeroed layers filled, so that every branch has its say."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        if parameter.abs().max() == 0:
            torch.nn.init.normal_(parameter, std=0.05)
    return module.eval()


def test_time_embedding_equals_diffusers():
    t = torch.tensor([0, 1, 500, 999])
    expected = get_timestep_embedding(t, 64, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(timestep_embedding(t, 64), expected, rtol=0, atol=1e-4)      # float32 angles of 999 radians


@pytest.mark.parametrize("context_dim", [None, 24])
def test_attention_equals_torch(context_dim):
    torch.manual_seed(0)
    attention = Attention(32, context_dim, heads=4)
    x, context = torch.randn(2, 10, 32), torch.randn(2, 6, 24) if context_dim else None
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2]) if context_dim else None
    q, k, v = (layer(y).unflatten(-1, (4, 8)).transpose(1, 2) for layer, y in (
        (attention.to_q, x), (attention.to_k, x if context is None else context), (attention.to_v, x if context is None else context)))
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else mask[:, None, None])
    torch.testing.assert_close(attention(x, context, mask), attention.to_out(expected.transpose(1, 2).flatten(2)), rtol=0, atol=1e-6)


def test_large_pictures_take_the_fused_attention_with_the_same_result(monkeypatch):
    torch.manual_seed(0)
    attention, x = Attention(16, heads=2), torch.randn(1, 600, 16)
    fused, calls = F.scaled_dot_product_attention, []
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or fused(*a, **k))
    large = attention(x)
    q, k, v = (layer(x).unflatten(-1, (2, 8)).transpose(1, 2) for layer in (attention.to_q, attention.to_k, attention.to_v))
    plain = ((q @ k.transpose(-1, -2) / 8 ** 0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
    assert calls
    torch.testing.assert_close(large, attention.to_out(plain), rtol=0, atol=1e-6)


@pytest.mark.parametrize("options, shape", [
    (dict(channels=(32, 64)), (2, 3, 16, 24)),
    (dict(channels=(32, 64, 64), blocks=1, attention=(False, False, True)), (2, 3, 32, 32)),
    (dict(channels=(32, 64), patch=4, pooled=True), (2, 3, 64, 64)),
    (dict(channels=(32,), in_channels=9, out_channels=4), (2, 9, 8, 8)),
])
def test_the_picture_keeps_its_size_and_every_weight_learns(options, shape):
    torch.manual_seed(0)
    network = shaken(UNet(context_dim=16, **options))
    x, mask = torch.randn(shape), torch.ones(2, 5, dtype=torch.bool)
    out = network(x, torch.tensor([3, 700]), torch.randn(2, 5, 16), mask)
    assert out.shape == (2, options.get("out_channels", 3), *shape[2:])
    out.square().sum().backward()
    silent = [name for name, p in network.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert silent == []


@pytest.mark.parametrize("masked", [True, False])
def test_a_few_pictures_at_a_time_give_the_same_attention(masked, monkeypatch):
    torch.manual_seed(0)
    attention, x, words = Attention(16, 8, heads=2), torch.randn(5, 12, 16), torch.randn(5, 6, 8)
    mask = torch.arange(6) < torch.tensor([[6], [1], [3], [2], [5]]) if masked else None
    at_once = attention(x, words, mask)
    monkeypatch.setattr(blocks, "MAX_SCORES", 2 * 12 * 6 * 2)           # two pictures at a time
    torch.testing.assert_close(attention(x, words, mask), at_once, rtol=0, atol=1e-6)


def test_a_network_without_words_needs_none():
    network = shaken(UNet(channels=(32, 64)))
    assert network(torch.randn(1, 3, 16, 16), torch.tensor([5])).shape == (1, 3, 16, 16)


def test_padding_is_never_attended_to():
    network, t = shaken(UNet(channels=(32, 64), context_dim=16, pooled=True)), torch.tensor([3, 700])
    x, words = torch.randn(2, 3, 16, 16), torch.randn(2, 5, 16)
    mask = torch.tensor([[True, True, True, False, False]]).expand(2, 5)
    other = torch.where(mask[..., None], words, torch.full_like(words, 100.0))
    torch.testing.assert_close(network(x, t, words, mask), network(x, t, other, mask), rtol=0, atol=1e-6)
    torch.testing.assert_close(network(x, t, words, mask), network(x, t, words[:, :3]), rtol=0, atol=1e-5)
    assert not torch.allclose(network(x, t, words, mask), network(x, t, words), atol=1e-3)


def test_a_new_network_says_nothing_and_new_blocks_pass_their_input_on():
    x = torch.randn(2, 32, 8, 8)
    assert UNet(channels=(32,))(torch.randn(1, 3, 8, 8), torch.tensor([1])).abs().max() == 0
    torch.testing.assert_close(ResidualBlock(32, 32, 64)(x, torch.randn(2, 64)), x)
    torch.testing.assert_close(SpatialTransformer(32)(x), x)


def test_the_mean_of_the_words_leaves_padding_out():
    words, mask = torch.tensor([[[2.0], [4.0], [99.0]]]), torch.tensor([[True, True, False]])
    assert masked_mean(words, mask).tolist() == [[3.0]]
    assert masked_mean(words[:, :2], None).tolist() == [[3.0]]


WORLDS = [dict(attention=(False, True)), dict(attention=(True, False)), dict(pooled=True), dict(patch=2)]


@pytest.mark.parametrize("options", WORLDS, ids=str)
@pytest.mark.parametrize("captions", [1, 3])
def test_remembered_words_give_the_same_answer(options, captions):
    network, t = shaken(UNet(channels=(32, 64), context_dim=16, **options)), torch.tensor([3, 500, 700])
    x, words = torch.randn(3, 3, 16, 16), torch.randn(captions, 9, 16)
    mask = torch.arange(9) < torch.randint(2, 7, (captions, 1))
    remembered = network.cache_context(words, mask)
    assert len(remembered[0].states[0]) == mask.any(0).sum() < 9                               # places without any word are left out
    with torch.no_grad():
        expected = network(x, t, words.expand(3, -1, -1), mask.expand(3, -1))
        for _ in range(2):
            torch.testing.assert_close(network(x, t, *remembered), expected, rtol=0, atol=2e-5)


def test_keys_are_computed_once_and_anew_when_the_weights_change():
    network, t = shaken(UNet(channels=(32, 64), context_dim=16)), torch.tensor([5])
    x, words, calls = torch.randn(1, 3, 16, 16), torch.randn(1, 4, 16), []
    keys = network.middle[1].block.cross_attention.to_k
    keys.register_forward_hook(lambda *_: calls.append(1))
    remembered = network.cache_context(words)
    with torch.no_grad():
        network(x, t, *remembered), network(x, t, *remembered)
        assert len(calls) == 1
        keys.weight.mul_(2)
        torch.testing.assert_close(network(x, t, *remembered), network(x, t, words), rtol=0, atol=1e-5)
    network(x, t, *remembered).sum().backward()
    network(x, t, *remembered).sum().backward()                                                 # each with a graph of its own
    assert keys.weight.grad.abs().max() > 0
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(network(x, t, *remembered)).all()


@pytest.mark.parametrize("options", WORLDS, ids=str)
def test_several_captions_for_each_picture_share_the_work_before_the_words(options):
    network = shaken(UNet(channels=(32, 64), context_dim=16, **options))
    x, words, t = torch.randn(2, 3, 16, 16), torch.randn(6, 4, 16), torch.tensor([3, 700])
    seen = []
    network.conv_in.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    batched_guidance = network(x, t, words)
    assert seen == [2] and len(batched_guidance) == 6
    torch.testing.assert_close(batched_guidance, network(x.repeat(3, 1, 1, 1), t.repeat(3), words), rtol=0, atol=2e-5)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("options", WORLDS, ids=str)
def test_guidance_asks_a_network_once_and_answers_as_with_two_calls(options, masked):
    network, calls = shaken(UNet(channels=(32, 64), context_dim=16, **options)), []
    network.register_forward_hook(lambda *_: calls.append(1))
    def meaning(output, x_t, t):
        return Prediction(output, x_t - output, t.view(-1, 1, 1, 1) * torch.ones(1))
    x, t, words = torch.randn(2, 3, 16, 16), torch.tensor([3, 700]), torch.randn(2, 6, 16)
    mask = torch.tensor([[True] * 4 + [False] * 2, [True] * 6]) if masked else None
    text, nothing = Denoiser(network, meaning, words, mask), Denoiser(network, meaning, torch.randn(1, 1, 16))
    with torch.no_grad():
        once = guided(text, nothing, 3.0)(x, t)
        assert len(calls) == 1
        twice = guided(lambda x, t: text(x, t), nothing, 3.0)(x, t)
        assert len(calls) == 3
    for a, b in zip(once, twice, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=5e-5)


def test_only_denoisers_of_the_same_network_are_asked_together():
    one, other = shaken(UNet(channels=(32,), context_dim=16)), shaken(UNet(channels=(32,), context_dim=16))
    words, calls = torch.randn(1, 2, 16), []
    for network in (one, other):
        network.register_forward_hook(lambda *_: calls.append(1))
    def meaning(output, x_t, t):
        return Prediction(output, output)
    batched_guidance(Denoiser(one, meaning, words), Denoiser(other, meaning, words))(torch.randn(1, 3, 8, 8), torch.tensor([1]))
    assert len(calls) == 2


def test_stacked_contexts_are_padded_and_the_padding_is_masked():
    context, mask = concat_contexts(torch.ones(2, 3, 4), None, torch.ones(1, 1, 4), None, batch=2)
    assert context.shape == (4, 3, 4) and mask.tolist() == [[True] * 3] * 2 + [[True, False, False]] * 2
    assert concat_contexts(torch.ones(1, 3, 4), None, torch.ones(1, 3, 4), None, batch=1)[1] is None


def test_masked_words_equal_diffusers(tmp_path):
    network = shaken(UNet(channels=(32, 64), context_dim=16, attention=(True, False)))
    save_stable_diffusion(network, tmp_path)
    peer = UNet2DConditionModel.from_pretrained(tmp_path).eval()
    x, t, words = torch.randn(2, 3, 16, 16), torch.tensor([3, 700]), torch.randn(2, 6, 16)
    mask = torch.tensor([[True] * 4 + [False] * 2, [True] * 6])
    torch.testing.assert_close(network(x, t, words, mask), peer(x, t, words, encoder_attention_mask=mask).sample, rtol=0, atol=1e-5)


@pytest.mark.parametrize("learned", [False, True])
def test_checkpointing_changes_memory_and_nothing_else(learned):
    options = dict(channels=(32, 64), context_dim=16, out_channels=6 if learned else 3)
    network, lean = shaken(UNet(**options)).train(), UNet(**options, checkpointing=True)
    lean.load_state_dict(network.state_dict())
    diffusion = GaussianDiffusion(NoiseSchedule.cosine(1000), variance="learned_range" if learned else "fixed_small")
    x0, t, words = torch.randn(4, 3, 16, 16).clamp(-1, 1), torch.tensor([3, 100, 500, 900]), torch.randn(4, 5, 16)
    kept = {}
    for module in (network, lean):
        with saved_tensors_hooks(lambda y, m=module: kept.__setitem__(m, kept.get(m, 0) + y.nbytes) or y, lambda y: y):
            loss = diffusion.loss(module, x0, t, words, generator=torch.Generator().manual_seed(0)).mean()
        loss.backward()
    assert kept[lean] < 0.5 * kept[network]
    for a, b in zip(network.parameters(), lean.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-6)


def test_dropout_sleeps_in_eval():
    network, x, t = shaken(UNet(channels=(32,), dropout=0.5)), torch.randn(1, 3, 8, 8), torch.tensor([1])
    assert torch.equal(network(x, t), network(x, t))
    network.train()
    assert not torch.allclose(network(x, t), network(x, t))


def test_a_class_is_a_caption_of_one_word():
    torch.manual_seed(0)
    network, classes = shaken(UNet(channels=(32,), context_dim=8, pooled=True)), torch.nn.Embedding(10, 8)
    x, t = torch.randn(1, 3, 8, 8).expand(3, -1, -1, -1), torch.tensor([1]).expand(3)
    a, b, again = network(x, t, classes(torch.tensor([4, 7, 4]))[:, None])
    assert not torch.allclose(a, b, atol=1e-3)
    torch.testing.assert_close(a, again)


def test_the_first_versions_network_has_its_size():
    with torch.device("meta"):
        plain, learned = UNet.easy_diffusion_2023(), UNet.easy_diffusion_2023(learned_variance=True)
    sizes = [sum(parameter.numel() for parameter in network.parameters()) for network in (plain, learned)]
    assert sizes == [92_773_123, 92_776_582]
    with torch.device("meta"):
        pictures = torch.empty(2, 3, 128, 128), torch.empty(2, dtype=torch.long), torch.empty(2, 52, 768)
        assert plain(*pictures).shape == (2, 3, 128, 128) and learned(*pictures).shape == (2, 6, 128, 128)


def test_compiled_networks_remember_words_and_notice_changed_weights():
    network = shaken(UNet(channels=(32,), context_dim=16))
    compiled = torch.compile(network, backend="eager")
    x, t, words = torch.randn(1, 3, 8, 8), torch.tensor([5]), torch.randn(1, 4, 16)
    remembered = compiled.cache_context(words)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(compiled(x, t, *remembered), network(x, t, words), rtol=0, atol=1e-5)
            network.middle[1].block.cross_attention.to_v.weight.mul_(2)


@pytest.mark.parametrize("call, says", [
    (lambda: UNet(pooled=True), "context_dim"),
    (lambda: Denoiser(None, None, torch.zeros(2, 1, 4))(torch.zeros(3, 3, 8, 8), torch.tensor([1])), "2 captions for 3"),
    (lambda: concat_contexts(torch.zeros(2, 1, 4), None, torch.zeros(1, 1, 4), None, 4), "2 captions for 4"),
    (lambda: UNet(channels=(32,), context_dim=4)(torch.zeros(2, 3, 8, 8), torch.tensor([1, 2]), torch.zeros(3, 1, 4)), "3 captions"),
    (lambda: UNet(channels=(32,), context_dim=4)(torch.zeros(2, 3, 8, 8), torch.tensor([1, 2])), "needs a context"),
    (lambda: UNet(channels=(48,)), "multiples of 32"),
    (lambda: UNet(channels=(32, 64), attention=(True,)), "one entry a level"),
    (lambda: Attention(30, heads=4), "4 heads"),
    (lambda: UNet(channels=(32, 64), patch=2)(torch.randn(1, 3, 30, 32), torch.tensor([1])), "multiples of 4"),
])
def test_wrong_numbers_are_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()

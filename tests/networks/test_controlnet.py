"""ControlNet: diffusers with the same weights, and the properties that training relies on."""

import copy

import pytest
import torch
from diffusers import ControlNetModel
from diffusers import UNet2DConditionModel as PeerUNet
from safetensors.torch import load_file

from easy_diffusion.diffusion.gaussian import GaussianDiffusion
from easy_diffusion.diffusion.guidance import guided
from easy_diffusion.diffusion.samplers import ddim
from easy_diffusion.diffusion.schedule import NoiseSchedule
from easy_diffusion.networks.controlnet import (
    Control,
    Controlled,
    ControlNet,
    ControlTraining,
    guess_scales,
    load_controlnet,
    save_controlnet,
)
from easy_diffusion.networks.motion import VideoUNet
from easy_diffusion.networks.stable_diffusion_weights import (
    load_stable_diffusion,
    map_tensor_names,
    save_stable_diffusion,
)
from easy_diffusion.networks.text_encoder import CharacterEncoder
from easy_diffusion.networks.unet import UNet
from easy_diffusion.networks.weights_io import check_settings, save_tree
from easy_diffusion.training.trainer import train

SETTINGS = dict(
    in_channels=4,
    out_channels=4,
    channels=(32, 64, 64, 64),
    context_dim=24,
    attention=(True, True, True, False),
    heads=4,
)
HINT = (16, 32, 96, 256)


def randomize(module, seed):
    """Random weights, also where training begins at zero."""
    torch.manual_seed(seed)
    for parameter in module.parameters():
        if parameter.abs().max() == 0:
            torch.nn.init.normal_(parameter, std=0.1)
    return module.eval()


@pytest.fixture(scope="module")
def peers():
    """diffusers' UNet and ControlNet in the layout of Stable Diffusion, but narrow."""
    torch.manual_seed(0)
    widths = dict(
        in_channels=4, block_out_channels=(32, 64, 64, 64), cross_attention_dim=24,
        attention_head_dim=4,
    )
    unet = PeerUNet(**widths)
    controlnet = ControlNetModel(**widths, conditioning_embedding_out_channels=HINT)
    return randomize(unet, 1), randomize(controlnet, 2)


@pytest.fixture(scope="module")
def ours(peers, tmp_path_factory):
    """Our networks with the weights of the peers."""
    folder = tmp_path_factory.mktemp("peers")
    unet = UNet(**SETTINGS).eval()
    controlnet = ControlNet(3, 8, HINT, **SETTINGS).eval()
    for module, peer in zip((unet, controlnet), peers):
        path = folder / type(peer).__name__
        peer.save_pretrained(path)
        load_stable_diffusion(module, path)
    return unet, controlnet


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 4, 16, 24, generator=generator)
    context = torch.randn(2, 7, 24, generator=generator)
    control = torch.rand(2, 3, 128, 192, generator=generator)
    return x, torch.tensor([3, 901]), control, context


def assert_close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))


# ---------------------------------------------------------------- diffusers


@pytest.mark.parametrize("guess", [False, True])
def test_residuals_and_the_controlled_unet_equal_diffusers(peers, ours, inputs, guess):
    x, t, control, context = inputs
    (peer_unet, peer_controlnet), (unet, controlnet) = peers, ours
    with torch.no_grad():
        down, middle = peer_controlnet(
            x, t, context, control, conditioning_scale=1.0 if guess else 0.7, guess_mode=guess,
            return_dict=False,
        )
        expected = peer_unet(
            x, t, context, down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
        ).sample
        residuals = controlnet(x, t, control, context)
        scales = guess_scales(len(residuals)) if guess else [0.7] * len(residuals)
        for residual, scale, theirs in zip(residuals, scales, (*down, middle), strict=True):
            assert_close(scale * residual, theirs)
        scale = scales if guess else 0.7
        output = Controlled(unet, [Control(controlnet, control, scale)])(x, t, context)
    assert_close(output, expected)
    assert (output - unet(x, t, context)).abs().max() > 0.1         # the control matters


def test_what_we_save_diffusers_loads(ours, inputs, tmp_path):
    x, t, control, context = inputs
    controlnet = randomize(copy.deepcopy(ours[1]), 5)
    save_stable_diffusion(controlnet, tmp_path)
    peer, report = ControlNetModel.from_pretrained(tmp_path, output_loading_info=True)
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not report[key]
    with torch.no_grad():
        down, middle = peer.eval()(x, t, context, control, return_dict=False)
        for residual, theirs in zip(controlnet(x, t, control, context), (*down, middle)):
            assert_close(residual, theirs)


def test_an_original_file_has_the_published_names_and_is_read_again(ours, tmp_path):
    path = tmp_path / "control.safetensors"
    save_stable_diffusion(ours[1], path)
    names = load_file(path).keys()
    for name in (
        "control_model.input_hint_block.0.weight",
        "control_model.input_hint_block.14.bias",
        "control_model.zero_convs.11.0.weight",
        "control_model.middle_block_out.0.bias",
        "control_model.input_blocks.0.0.weight",
        "control_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
        "control_model.middle_block.1.proj_in.weight",
        "control_model.time_embed.2.weight",
    ):
        assert name in names, name
    again = ControlNet(3, 8, HINT, **SETTINGS)
    load_stable_diffusion(again, path)
    for name, tensor in ours[1].state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_the_published_size():
    with torch.device("meta"):
        controlnet = ControlNet.stable_diffusion_15()
    assert sum(parameter.numel() for parameter in controlnet.parameters()) == 361_279_120
    assert len(map_tensor_names(controlnet)) == len(controlnet.state_dict())


# ---------------------------------------------------------------- an untrained ControlNet


def small_unet(**changes):
    settings = dict(channels=(64, 64), attention=(False, True), context_dim=8, patch=2, pooled=True)
    return randomize(UNet(**settings | changes), 0)


def small_inputs():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 16, 16, generator=generator)
    return x, torch.tensor([5, 900]), torch.randn(2, 4, 8, generator=generator)


@pytest.mark.parametrize("hint_channels", [None, (16, 32)])
def test_an_untrained_controlnet_changes_no_bit_but_has_a_gradient(hint_channels):
    unet = small_unet()
    x, t, context = small_inputs()
    controlnet = ControlNet.from_unet(unet, 5, hint_channels=hint_channels)
    network = Controlled(unet, [Control(controlnet, torch.rand(1, 5, 16, 16))])
    output = network(x, t, context)
    assert torch.equal(output, unet(x, t, context))
    for name, tensor in unet.state_dict().items():
        if name in controlnet.state_dict():
            assert torch.equal(controlnet.state_dict()[name], tensor)
    output.square().mean().backward()
    assert all(zero.weight.grad.abs().max() > 0 for zero in controlnet.zero_convs)
    assert controlnet.zero_middle.weight.grad.abs().max() > 0


@pytest.mark.parametrize("changes", [
    dict(patch=1), dict(patch=4), dict(blocks=1, channels=(64, 64, 64), attention=None),
    dict(context_dim=None, pooled=False), dict(checkpointing=True),
])
def test_it_has_a_residual_for_each_stored_output(changes):
    unet = small_unet(**changes)
    x, t, context = small_inputs()
    context = context if unet.context_dim else None
    controlnet = randomize(ControlNet.from_unet(unet, 1), 1)
    with_control = Controlled(unet, [Control(controlnet, torch.rand(2, 1, 16, 16))])
    output = with_control(x, t, context)
    assert output.shape == x.shape
    assert (output - unet(x, t, context)).abs().max() > 0.01


def test_a_control_of_latents_has_the_resolution_of_the_image():
    unet = small_unet(patch=1)
    x, t, context = small_inputs()
    controlnet = ControlNet.from_unet(unet, 3, factor=4)
    residuals = controlnet(x, t, torch.rand(2, 3, 64, 64), context)
    assert residuals[0].shape == (2, 64, 16, 16)


def test_training_moves_the_controlnet_alone_and_lowers_the_loss():
    """The target is a constant image whose level is that of the control."""
    unet = small_unet()
    before = copy.deepcopy(unet.state_dict())
    controlnet = ControlNet.from_unet(unet, 1)
    network = ControlTraining(unet, controlnet)
    diffusion = GaussianDiffusion(NoiseSchedule.cosine(100), prediction_type="x0")
    assert all(name.startswith("controlnet.") for name in network.state_dict())
    encoder = CharacterEncoder("番茄汤", dim=8, layers=1).requires_grad_(False)
    levels = torch.randint(256, (16, 1, 1, 1), dtype=torch.uint8)
    images = levels.expand(16, 3, 8, 8).contiguous()
    controls = levels.expand(16, 1, 8, 8).contiguous()
    loader = [(images, ["番茄汤"] * 16, {"control": controls})]
    losses = [
        step.loss for step in train(
            network, diffusion, loader, encoder, steps=40, learning_rate=2e-3, caption_dropout=0.5
        )
    ]
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    for name, tensor in unet.state_dict().items():
        assert torch.equal(tensor, before[name]), name


# ---------------------------------------------------------------- several controls


def test_residuals_of_controls_add_up_and_scale_and_interval_apply():
    unet = small_unet()
    x, t, context = small_inputs()
    first, second = (randomize(ControlNet.from_unet(unet, 1), seed) for seed in (1, 2))
    one, two = torch.rand(2, 1, 16, 16), torch.rand(1, 1, 16, 16)
    with torch.no_grad():
        both = Controlled(unet, [Control(first, one), Control(second, two, 0.5)])
        residuals = [
            a + 0.5 * b
            for a, b in zip(first(x, t, one, context), second(x, t, two, context), strict=True)
        ]
        expected = unet(x, t, context, residuals=residuals)
        torch.testing.assert_close(both(x, t, context), expected, rtol=0, atol=1e-5)
        early = Controlled(unet, [Control(first, one, interval=(500, 1000))])
        t = torch.tensor([400, 400])
        assert torch.equal(early(x, t, context), unet(x, t, context))
        t = torch.tensor([600, 600])
        always = Controlled(unet, [Control(first, one)])
        assert torch.equal(early(x, t, context), always(x, t, context))


@torch.no_grad()
def test_each_frame_of_a_film_has_its_control():
    unet = small_unet()
    video = VideoUNet.from_unet(unet).eval()
    _, t, context = small_inputs()
    film, control = torch.randn(2, 3, 4, 16, 16), torch.rand(2, 1, 4, 16, 16)
    untrained = Controlled(video, [Control(ControlNet.from_unet(unet, 1), control)])
    assert torch.equal(untrained(film, t, context), video(film, t, context))

    # Without trained motion modules each frame is that of the controlled image network.
    controlnet = randomize(ControlNet.from_unet(unet, 1), 1)
    out = Controlled(video, [Control(controlnet, control)])(film, t, context)
    for f in range(4):
        image = Controlled(unet, [Control(controlnet, control[:, :, f])])
        expected = image(film[:, :, f], t, context)
        torch.testing.assert_close(out[:, :, f], expected, rtol=0, atol=1e-5)

    # A context for each frame
    per_frame = context[:, None].repeat(1, 4, 1, 1)
    controlled = Controlled(video, [Control(controlnet, control)])
    torch.testing.assert_close(controlled(film, t, per_frame), out, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"\(2, 1, 16, 16\)"):
        Controlled(video, [Control(controlnet, control[:, :, 0])])(film, t, context)

    # One control film, and one caption, serve all films.
    one = Controlled(video, [Control(controlnet, control[:1])])
    same = Controlled(video, [Control(controlnet, control[:1].expand(2, -1, -1, -1, -1))])
    torch.testing.assert_close(
        one(film, t, context[:1]), same(film, t, context[:1].expand(2, -1, -1)), rtol=0, atol=1e-5
    )


def test_guidance_and_a_sampler_take_it_as_a_network():
    """Guess mode: the control in the conditional prediction alone."""
    unet = small_unet()
    diffusion = GaussianDiffusion(NoiseSchedule.cosine(100), prediction_type="x0")
    controlnet = randomize(ControlNet.from_unet(unet, 1), 1)
    _, _, context = small_inputs()
    network = Controlled(unet, [Control(controlnet, torch.rand(2, 1, 16, 16), guess_scales(7))])
    denoise = guided(
        diffusion.denoiser(network, context), diffusion.denoiser(unet, context[:1]), scale=2.0
    )
    with torch.no_grad():
        *_, last = ddim(denoise, diffusion.schedule, shape=(2, 3, 16, 16), steps=3)
    assert last.x.shape == (2, 3, 16, 16) and last.x.isfinite().all()


@pytest.mark.parametrize("control, message", [
    (torch.rand(2, 1, 8, 16), "the control must be"),
    (torch.rand(2, 3, 16, 16), "the control must be"),
    (torch.rand(3, 1, 16, 16), "the control must be"),
    (torch.rand(2, 1, 16, 16) * 2 - 1, r"must be in \[0, 1\]"),
    (torch.rand(2, 1, 16, 16) * 255, r"must be in \[0, 1\]"),
])
def test_a_wrong_control_is_named(control, message):
    unet = small_unet()
    x, t, context = small_inputs()
    with pytest.raises(ValueError, match=message):
        Controlled(unet, [Control(ControlNet.from_unet(unet, 1), control)])(x, t, context)


def test_hint_channels_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="halve the control 3 times"):
        ControlNet(3, 4, HINT, **SETTINGS)
    with pytest.raises(ValueError, match="has the hint encoder of squares"):
        map_tensor_names(ControlNet(3, 8, **SETTINGS))


# ---------------------------------------------------------------- files


def test_a_file_rebuilds_the_controlnet_for_its_unet_alone(tmp_path):
    unet = small_unet()
    x, t, context = small_inputs()
    controlnet = randomize(ControlNet.from_unet(unet, 1), 1)
    save_controlnet(tmp_path / "control.safetensors", controlnet, unet, "edges")
    loaded, note = load_controlnet(tmp_path / "control.safetensors", unet)
    assert note == "edges" and loaded.settings == controlnet.settings
    control = torch.rand(2, 1, 16, 16)
    with torch.no_grad():
        for a, b in zip(loaded(x, t, control, context), controlnet(x, t, control, context)):
            torch.testing.assert_close(a, b, rtol=0, atol=2e-3 * float(b.abs().max()))
    other = small_unet()
    with torch.no_grad():
        other.conv_out.bias += 0.1
    with pytest.raises(ValueError, match="for a UNet with other weights"):
        load_controlnet(tmp_path / "control.safetensors", other)
    save_tree(tmp_path / "tree.safetensors", {"a": 1})
    with pytest.raises(ValueError, match="not one of a ControlNet"):
        load_controlnet(tmp_path / "tree.safetensors", unet)


def test_a_training_for_another_unet_is_refused_and_copies_have_the_same_unet():
    unet = small_unet()
    network = ControlTraining(unet, ControlNet.from_unet(unet, 1))
    assert copy.deepcopy(network).frozen.unet is unet
    other = copy.deepcopy(unet)
    torch.nn.init.normal_(other.conv_in.weight)
    with pytest.raises(ValueError, match="unet: "):
        check_settings(network.settings, ControlTraining(other, ControlNet.from_unet(other, 1)))


def test_a_wrong_number_of_scales_is_named():
    unet = small_unet()
    x, t, context = small_inputs()
    control = Control(ControlNet.from_unet(unet, 1), torch.rand(1, 1, 16, 16), [1.0, 2.0])
    with pytest.raises(ValueError, match="2 scales do not fit"):
        Controlled(unet, [control])(x, t, context)

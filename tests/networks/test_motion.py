"""Motion modules: untrained ones have no effect, circular films roll, diffusers' numbers."""

import diffusers
import pytest
import torch

from easy_diffusion.networks.motion import (
    FrameAttention,
    MotionModule,
    VideoUNet,
    circular_angles,
    embed_frames,
    rotate,
)
from easy_diffusion.networks.motion_weights import (
    ANIMATE_DIFF,
    load_motion_adapter,
    save_motion_adapter,
)
from easy_diffusion.networks.stable_diffusion_weights import save_stable_diffusion
from easy_diffusion.networks.unet import UNet

CHANNELS = (32, 64)
DIM = 16


def randomise(module, seed=0):
    """Random weights everywhere, also in the layers that begin at zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if "norm" not in name:
            scale = 0.5 / parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 0.1
            parameter.data = scale * torch.randn(parameter.shape, generator=generator)
    return module.eval()


def make_unet(**settings):
    settings = dict(in_channels=4, out_channels=4, channels=CHANNELS, context_dim=DIM) | settings
    return randomise(UNet(heads=4, **settings))


def inputs(frames=6, batch=2):
    generator = torch.Generator().manual_seed(1)
    film = torch.randn(batch, 4, frames, 8, 8, generator=generator)
    context = torch.randn(batch, 3, DIM, generator=generator)
    mask = torch.tensor([[True, True, False], [True, True, True]])[:batch]
    return film, torch.tensor([10, 700])[:batch], context, mask


def each_frame(unet, film, t, context, mask):
    """The image network's outputs of each frame, as a film."""
    return torch.stack([unet(frame, t, context, mask) for frame in film.unbind(2)], dim=2)


@torch.no_grad()
@pytest.mark.parametrize("patch, pooled", [(1, False), (2, True)])
@pytest.mark.parametrize("norm_over_frames", [False, True])
def test_an_untrained_video_network_is_the_image_network_frame_by_frame(
    patch, pooled, norm_over_frames
):
    unet = make_unet(patch=patch, pooled=pooled, attention=(False, True))
    video = VideoUNet.from_unet(unet, norm_over_frames=norm_over_frames).eval()
    film, t, context, mask = inputs()
    # As one batch the numbers are the same to the bit
    flat = film.transpose(1, 2).flatten(0, 1)
    rows = [row.repeat_interleave(6, dim=0) for row in (t, context, mask)]
    expected = unet(flat, *rows).unflatten(0, (2, 6)).transpose(1, 2)
    out = video(film, t, context, mask)
    assert torch.equal(out, expected)
    torch.testing.assert_close(out, each_frame(unet, film, t, context, mask), rtol=0, atol=1e-5)


@torch.no_grad()
def test_one_context_serves_all_films():
    video = randomise(VideoUNet.from_unet(make_unet()))
    film, t, context, _ = inputs()
    one = video(film, t, context[:1])
    torch.testing.assert_close(one, video(film, t, context[:1].expand(2, -1, -1)), rtol=0,
                               atol=1e-5)


@torch.no_grad()
def test_a_context_for_each_frame_reaches_its_frame_alone_in_an_untrained_network():
    unet = make_unet()
    video = VideoUNet.from_unet(unet)
    film, t, context, mask = inputs()
    frames = film.shape[2]
    per_frame = context[:, None].repeat(1, frames, 1, 1)
    masks = mask[:, None].repeat(1, frames, 1)
    assert torch.equal(video(film, t, per_frame, masks), video(film, t, context, mask))
    per_frame[:, 2] += 1
    out = video(film, t, per_frame, masks)
    for f in range(frames):
        expected = unet(film[:, :, f], t, per_frame[:, f], masks[:, f])
        torch.testing.assert_close(out[:, :, f], expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=f"context of 3 frames does not fit {frames}"):
        video(film, t, per_frame[:, :3], masks[:, :3])


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 5, 6, 8])
def test_with_circular_positions_rolling_the_input_rolls_the_output(frames):
    video = randomise(VideoUNet.from_unet(make_unet()))
    film, t, context, mask = inputs(frames)
    out = video(film, t, context, mask)
    rolled = video(film.roll(2, dims=2), t, context, mask)
    assert (rolled - out.roll(2, dims=2)).abs().max() < 1e-5 * out.abs().max()


@torch.no_grad()
def test_with_sinusoidal_positions_it_does_not():
    video = randomise(VideoUNet.from_unet(make_unet(), positions="sinusoidal"))
    film, t, context, mask = inputs()
    out = video(film, t, context, mask)
    rolled = video(film.roll(2, dims=2), t, context, mask)
    assert (rolled - out.roll(2, dims=2)).abs().max() > 1e-3 * out.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("positions", ["circular", "sinusoidal"])
def test_the_order_of_the_frames_matters(positions):
    """Without positions the frames would be a set: a permutation would only permute the output."""
    video = randomise(VideoUNet.from_unet(make_unet(), positions=positions))
    film, t, context, mask = inputs()
    order = [0, 2, 1, 3, 5, 4]
    difference = video(film[:, :, order], t, context, mask) - video(film, t, context, mask)[
        :, :, order
    ]
    assert difference.abs().max() > 1e-3


@pytest.mark.parametrize("frames", [2, 7, 8])
def test_the_scores_of_circular_positions_depend_on_the_difference_modulo_f(frames):
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 16, generator=generator, dtype=torch.float64).expand(2, frames, 16)
    angles = circular_angles(frames, 8).double()
    scores = rotate(q, angles) @ rotate(k, angles).T                            # [F, F]
    f = torch.arange(frames)
    by_difference = scores[0, (f[None] - f[:, None]) % frames]
    torch.testing.assert_close(scores, by_difference, rtol=0, atol=1e-5)     # float32 angles


def test_no_two_frames_have_the_same_circular_position():
    for frames in (2, 3, 8, 16):
        angles = circular_angles(frames, 16)
        points = torch.cat([angles.cos(), angles.sin()], dim=1)
        distances = torch.cdist(points, points) + 10 * torch.eye(frames)
        assert distances.min() > 0.1


@pytest.mark.parametrize("dim", [16, 64])
def test_the_embedding_of_the_frames_is_diffusers(dim):
    theirs = diffusers.models.embeddings.SinusoidalPositionalEmbedding(dim, max_seq_length=32)
    expected = theirs(torch.zeros(1, 32, dim))[0]
    torch.testing.assert_close(embed_frames(32, dim), expected, rtol=0, atol=1e-5)


def test_only_the_motion_modules_learn_if_the_image_network_is_frozen():
    video = VideoUNet.from_unet(make_unet())
    video.requires_grad_(False)
    for parameter in video.motion_parameters():
        parameter.requires_grad_(True)
    film, t, context, mask = inputs()
    video(film, t, context, mask).square().mean().backward()
    moved = {name for name, p in video.named_parameters() if p.grad is not None}
    assert moved and all(name.startswith("motion_") for name in moved)
    names = [name for name, _ in video.named_parameters() if name.startswith("motion_")]
    assert len(video.motion_parameters()) == len(names)
    gradients = [video.motion_middle.proj_out.weight.grad, video.motion_up[0].proj_out.weight.grad]
    assert all(gradient.abs().max() > 0 for gradient in gradients)


def test_the_settings_rebuild_the_network():
    video = VideoUNet.from_unet(make_unet(), positions="sinusoidal", heads=2)
    again = VideoUNet(**video.settings)
    again.load_state_dict(video.state_dict())
    assert again.settings == video.settings


# ------------------------------------------------------------------------- diffusers


@pytest.fixture(params=[(True, True), (False, True)], ids=str)
def both(request, tmp_path):
    """(our network, diffusers') with the same random weights, by way of saved files."""
    unet = make_unet(attention=request.param)
    video = randomise(VideoUNet.from_unet(unet, **ANIMATE_DIFF | dict(heads=2)), seed=2)
    video.load_state_dict(video.state_dict() | unet.state_dict())
    save_stable_diffusion(unet, tmp_path / "unet")
    save_motion_adapter(video, tmp_path / "motion")
    theirs = diffusers.UNetMotionModel.from_unet2d(
        diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "unet"),
        diffusers.MotionAdapter.from_pretrained(tmp_path / "motion"),
    )
    return video, theirs.eval(), tmp_path


@torch.no_grad()
def test_the_output_equals_diffusers(both):
    video, theirs, _ = both
    film, t, context, _ = inputs()
    for row in range(2):
        repeated = context[row:row + 1].expand(film.shape[2], -1, -1)   # as its pipeline does
        expected = theirs(film[row:row + 1], t[row], repeated).sample
        ours = video(film, t, context)[row:row + 1]
        assert (ours - expected).abs().max() < 1e-5 * expected.abs().max()


@torch.no_grad()
def test_motion_modules_of_diffusers_are_read(both, tmp_path):
    video, theirs, _ = both
    adapter = diffusers.MotionAdapter(
        block_out_channels=CHANNELS, motion_num_attention_heads=2, motion_layers_per_block=2
    )
    adapter.save_pretrained(tmp_path / "theirs")
    theirs.load_motion_modules(adapter)
    load_motion_adapter(video, tmp_path / "theirs")
    film, t, context, _ = inputs(batch=1)
    expected = theirs(film, t, context.expand(film.shape[2], -1, -1)).sample
    assert (video(film, t, context) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_a_file_that_is_saved_is_read_again(both):
    video, _, folder = both
    again = VideoUNet.from_unet(make_unet(attention=video.attention),
                                **ANIMATE_DIFF | dict(heads=2))
    load_motion_adapter(again, folder / "motion" / "diffusion_pytorch_model.safetensors")
    for a, b in zip(again.motion_parameters(), video.motion_parameters(), strict=True):
        assert torch.equal(a, b)


# ------------------------------------------------------------------------- errors


def test_errors_name_what_is_wrong(tmp_path):
    unet = make_unet()
    video = VideoUNet.from_unet(unet)
    film, t, context, _ = inputs()
    with pytest.raises(ValueError, match=r"\(2, 4, 8, 8\)"):
        video(film[:, :, 0], t, context)
    with pytest.raises(ValueError, match="context_dim"):
        video(film, t)
    with pytest.raises(ValueError, match="multiples of 2"):
        video(film[..., :7], t, context)
    with pytest.raises(ValueError, match="circular, sinusoidal, not 'learned'"):
        MotionModule(32, positions="learned")
    with pytest.raises(ValueError, match="even number"):
        FrameAttention(12, 4, "circular")
    with pytest.raises(ValueError, match="attentions, expansion.*timed"):
        save_motion_adapter(video, tmp_path)
    with pytest.raises(FileNotFoundError):
        load_motion_adapter(VideoUNet.from_unet(unet, **ANIMATE_DIFF), tmp_path / "nowhere")
    save_motion_adapter(VideoUNet.from_unet(make_unet(blocks=1), **ANIMATE_DIFF), tmp_path)
    with pytest.raises(ValueError, match="down_blocks.0.motion_modules.1"):
        load_motion_adapter(VideoUNet.from_unet(unet, **ANIMATE_DIFF), tmp_path)

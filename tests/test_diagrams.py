import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

from easy_diffusion import diagrams
from easy_diffusion.networks.controlnet import ControlNet
from easy_diffusion.networks.motion import VideoUNet
from easy_diffusion.networks.unet import UNet

FIXED = [
    diagrams.draw_data_flow, diagrams.draw_latent_pipeline, diagrams.draw_cross_attention,
    diagrams.draw_guidance, diagrams.draw_repaint,
]


def draw_controlnet():
    controlnet = ControlNet.from_unet(UNet(channels=(32, 64), context_dim=16), 4)
    return diagrams.draw_controlnet(controlnet, 16, torch.zeros(1, 3, 16))


def draw_video_unet():
    return diagrams.draw_video_unet(VideoUNet(channels=(32, 64), patch=2), 16, frames=8)


@pytest.mark.parametrize("draw", [*FIXED, draw_controlnet, draw_video_unet])
def test_all_text_and_arrows_of_a_diagram_are_inside(draw):
    figure = draw()
    renderer = FigureCanvasAgg(figure).get_renderer()
    frame = figure.bbox
    axes, = figure.axes
    assert axes.texts and axes.patches
    for text in axes.texts:
        box = text.get_window_extent(renderer)
        if text.get_text():
            assert frame.x0 <= box.x0 and box.x1 <= frame.x1, text.get_text()
            assert frame.y0 <= box.y0 and box.y1 <= frame.y1, text.get_text()


def test_the_diagram_of_a_unet_has_the_shapes_of_its_forward_pass():
    network = UNet(channels=(32, 64), attention=(False, True), context_dim=16, blocks=1)
    figure = diagrams.draw_unet(network, 16, torch.zeros(1, 3, 16), torch.ones(1, 3, dtype=bool))
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts.count("first convolution\n[32, 16, 16]") == 1
    assert texts.count("residual + attention\n[64, 8, 8]") == 2     # down, and the first of up
    assert texts.count("residual + attention + residual\n[64, 8, 8]") == 1
    assert texts.count("residual + attention + upsample\n[64, 16, 16]") == 1
    stages = [text for text in texts if "[" in text]
    assert len(stages) == 1 + len(network.down) + 1 + len(network.up)
    assert not any(module._forward_hooks for module in network.modules())


def test_the_diagram_of_a_controlnet_has_the_shapes_of_its_residuals():
    texts = [text.get_text() for text in draw_controlnet().axes[0].texts]
    assert [text for text in texts if "residual" in text] == [
        f"residual {shape}" for shape in
        [[32, 16, 16]] * 3 + [[32, 8, 8]] + [[64, 8, 8]] * 3
    ]


def test_the_diagram_of_a_video_unet_has_the_shapes_of_a_film():
    texts = [text.get_text() for text in draw_video_unet().axes[0].texts]
    assert "film $x_t$\n[B, 3, 8, 16, 16]" in texts
    assert "one sequence a position\n[B·8·8, 8, 32]" in texts

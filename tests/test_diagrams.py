import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

from easy_diffusion import diagrams
from easy_diffusion.networks.unet import UNet

FIXED = [
    diagrams.draw_data_flow, diagrams.draw_latent_pipeline, diagrams.draw_cross_attention,
    diagrams.draw_guidance, diagrams.draw_repaint,
]


@pytest.mark.parametrize("draw", FIXED)
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

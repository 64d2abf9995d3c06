import copy

import torch
from accelerate import Accelerator

from easy_diffusion.diffusion.gaussian import GaussianDiffusion
from easy_diffusion.diffusion.schedule import NoiseSchedule
from easy_diffusion.training.ema import update_ema
from easy_diffusion.training.trainer import train


def test_the_first_steps_forget_the_initial_weights_and_later_ones_average_slowly():
    model = torch.nn.Linear(1, 1, bias=False)
    ema_model = copy.deepcopy(model)
    expected = float(model.weight.detach())
    for index in range(200):
        torch.nn.init.constant_(model.weight, float(index))
        update_ema(ema_model, model, index, decay=0.9)
        decay = min(0.9, (1 + index) / (10 + index))
        expected = decay * expected + (1 - decay) * index
    torch.testing.assert_close(ema_model.weight.item(), expected, rtol=1e-5, atol=0)


class NormalizedNetwork(torch.nn.Module):
    """Two convolutions with BatchNorm, which normalizes by running statistics in eval mode."""

    def __init__(self):
        super().__init__()
        self.conv_in = torch.nn.Conv2d(3, 16, 3, padding=1)
        self.norm = torch.nn.BatchNorm2d(16)
        self.conv_out = torch.nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, x_t, t, context, mask):
        return self.conv_out(torch.relu(self.norm(self.conv_in(x_t))))


def test_the_ema_of_a_network_with_batch_norm_has_its_running_statistics_and_its_loss():
    torch.manual_seed(0)
    diffusion = GaussianDiffusion(NoiseSchedule.cosine(100), prediction_type="x0")
    network = NormalizedNetwork()
    images = torch.randint(200, 256, (16, 3, 8, 8), dtype=torch.uint8)
    *_, step = train(
        network, diffusion, [(images, [""] * 16)], steps=200, learning_rate=3e-3, ema=0.9,
        accelerator=Accelerator(mixed_precision="no"),
    )
    ema_network = step.ema_network
    for name, buffer in network.named_buffers():
        assert torch.equal(ema_network.get_buffer(name), buffer), name
    assert float(network.norm.num_batches_tracked) == 200

    def evaluate(module):
        x0 = images.float() / 127.5 - 1
        t = torch.arange(16) * 6
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            return float(diffusion.loss(module.eval(), x0, t, None, None, generator).mean())

    loss = evaluate(network)
    assert loss < 0.1
    assert abs(evaluate(ema_network) - loss) < 0.2 * loss

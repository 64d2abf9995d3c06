"""All weights cast at once give the numbers of autocast, with fewer operations."""

import pytest
import torch
from torch import nn

from datasets.dishes import dish_names
from easy_diffusion import presets
from easy_diffusion.training.operations import count_operations
from easy_diffusion.training.weight_casts import WeightCasts

CAPTIONS = ["番茄炒鸡蛋", "土豆汤"]
DTYPE = torch.bfloat16


def build_models(**options):
    """The demo's encoder and network, or with other options, in a ModuleDict; and its diffusion."""
    torch.manual_seed(0)
    network, encoder, diffusion = presets.build_networks("".join(dish_names("train")))
    network.checkpointing = options.get("checkpointing", False)
    return nn.ModuleDict({"network": network, "encoder": encoder}), diffusion


def compute_gradients(dtype, micro_batches=1, **options):
    """Gradients by name, and the number of operations, with the casts of WeightCasts in dtype."""
    models, diffusion = build_models(**options)
    x0 = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([10, 700])
    casts = WeightCasts(models, dtype)

    def backpropagate():
        with casts.apply():
            generator = torch.Generator().manual_seed(1)
            for x0_part, t_part in zip(x0.chunk(micro_batches), t.chunk(micro_batches)):
                with torch.autocast("cpu", DTYPE):
                    context, mask = models["encoder"](CAPTIONS[: len(x0_part)])
                    loss = diffusion.loss(
                        models["network"], x0_part, t_part, context, mask, generator
                    )
                loss.sum().backward()

    operations = count_operations(backpropagate).total()
    return {name: weight.grad for name, weight in models.named_parameters()}, operations


@pytest.mark.parametrize(
    "options", [{}, {"micro_batches": 2}, {"checkpointing": True}],
    ids=["plain", "micro-batches", "checkpointing"],
)
def test_gradients_are_those_of_autocast_bit_for_bit(options):
    expected, many = compute_gradients(torch.float32, **options)
    gradients, few = compute_gradients(DTYPE, **options)
    assert few < many - 300
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        assert torch.equal(gradient, expected[name]), name


def test_the_parameters_return_even_after_an_error():
    layer = nn.Linear(4, 4)
    parameters = list(layer.parameters())
    casts = WeightCasts(layer, DTYPE)
    with pytest.raises(KeyError), casts.apply():
        assert layer.weight.dtype == layer.bias.dtype == DTYPE
        raise KeyError
    assert all(a is b for a, b in zip(layer.parameters(), parameters))


def test_a_weight_of_two_layers_is_cast_once_and_an_unused_one_has_no_gradient():
    model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)])
    model[1].weight = model[0].weight
    with WeightCasts(model, DTYPE).apply():
        assert model[1].weight is model[0].weight
        loss = model[1](model[0](torch.ones(2, 4, dtype=DTYPE))).sum()
    loss.backward()
    assert model[0].weight.grad.dtype == torch.float32
    assert model[2].weight.grad is None


def test_frozen_weights_norms_and_embeddings_are_left_alone():
    model = nn.Sequential(nn.Embedding(4, 4), nn.LayerNorm(4), nn.Linear(4, 4))
    model[2].weight.requires_grad_(False)
    with WeightCasts(model, DTYPE).apply():
        lower = [name for name, weight in model.named_parameters() if weight.dtype == DTYPE]
    assert lower == ["2.bias"]


def test_in_float32_nothing_is_cast():
    layer = nn.Linear(4, 4)
    weight = layer.weight
    with WeightCasts(layer, torch.float32).apply():
        assert layer.weight is weight

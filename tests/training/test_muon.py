import pytest
import torch

from easy_diffusion.training.muon import Muon, orthogonalize


@pytest.mark.parametrize("shape", [(3, 32, 96), (2, 96, 32), (1, 64, 64)])
def test_orthogonal_keeps_the_directions_and_evens_their_lengths(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
    got = orthogonalize(matrices)
    lengths = torch.einsum("nri,nrc,nic->ni", u, got, vh)                  # uᵢᵀ X vᵢ, 1 for the orthogonal matrix U Vᵀ
    ratio = s / s.amax(dim=1, keepdim=True)
    assert lengths[ratio > 0.05].min() > 0.6 and lengths.max() < 1.3       # the published coefficients reach 0.7 … 1.2; bf16
    rest = got - torch.einsum("nri,ni,nic->nrc", u, lengths, vh)
    assert rest.norm() < 0.1 * got.norm()


def test_steps_equal_torch():
    torch.manual_seed(0)
    start, target = torch.randn(48, 32), torch.randn(48, 32)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizers = (Muon([ours], 0.02, momentum=0.95, weight_decay=0.1),
                  torch.optim.Muon([theirs], lr=0.02, momentum=0.95, weight_decay=0.1, nesterov=True, adjust_lr_fn="match_rms_adamw"))
    for _ in range(10):
        for weight, optimizer in zip((ours, theirs), optimizers):
            optimizer.zero_grad()
            (weight - target).square().sum().backward()
            optimizer.step()
    moved = (theirs - start).norm()
    assert (ours - theirs).norm() < 0.02 * moved                           # both orthogonalise in bfloat16


def test_a_convolution_is_a_matrix_of_its_output_channels():
    torch.manual_seed(0)
    conv, linear = torch.nn.Conv2d(4, 8, 3, bias=False), torch.nn.Linear(36, 8, bias=False)
    linear.weight.data.copy_(conv.weight.flatten(1))
    for layer in (conv, linear):
        layer.weight.grad = torch.randn(8, 36, generator=torch.Generator().manual_seed(1)).view_as(layer.weight)
        Muon([layer.weight], 0.1).step()
    torch.testing.assert_close(conv.weight.flatten(1), linear.weight)


def test_vectors_are_refused():
    with pytest.raises(ValueError, match=r"\(7,\)"):
        Muon([torch.nn.Parameter(torch.zeros(7))])

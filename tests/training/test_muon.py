import pytest
import torch

from easy_diffusion.training import muon
from easy_diffusion.training.muon import Muon, iteration_dtype, orthogonalize


@pytest.mark.parametrize("shape", [(3, 32, 96), (2, 96, 32), (1, 64, 64)])
def test_orthogonalize_keeps_the_singular_vectors_and_equalizes_the_singular_values(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
    result = orthogonalize(matrices)
    # uᵢᵀ X vᵢ, which is 1 for the orthogonal matrix X = U Vᵀ.
    values = torch.einsum("nri,nrc,nic->ni", u, result, vh)
    relative = s / s.amax(dim=1, keepdim=True)
    # The published coefficients reach 0.7 … 1.2; bfloat16 adds an error.
    assert values[relative > 0.05].min() > 0.6
    assert values.max() < 1.3
    rest = result - torch.einsum("nri,ni,nic->nrc", u, values, vh)
    assert rest.norm() < 0.1 * result.norm()


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with 2.9")
@pytest.mark.parametrize("shape", [(48, 32), (32, 48)])
def test_steps_are_those_of_torchs_muon(monkeypatch, shape):
    monkeypatch.setattr(muon, "iteration_dtype", lambda device: torch.bfloat16)
    torch.manual_seed(0)
    start = torch.randn(shape)
    target = torch.randn(shape)
    ours = torch.nn.Parameter(start.clone())
    theirs = torch.nn.Parameter(start.clone())
    our_optimizer = Muon([ours], 0.02, momentum=0.95, weight_decay=0.1)
    their_optimizer = torch.optim.Muon(
        [theirs],
        lr=0.02,
        momentum=0.95,
        weight_decay=0.1,
        nesterov=True,
        adjust_lr_fn="match_rms_adamw",
    )
    for _ in range(10):
        for parameter, optimizer in ((ours, our_optimizer), (theirs, their_optimizer)):
            optimizer.zero_grad()
            (parameter - target).square().sum().backward()
            optimizer.step()
    change = (theirs - start).norm()
    assert (ours - theirs).norm() < 1e-6 * change       # the same operations in bfloat16


def test_a_convolution_counts_as_a_matrix_with_one_row_per_output_channel():
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(4, 8, 3, bias=False)
    linear = torch.nn.Linear(36, 8, bias=False)
    linear.weight.data.copy_(conv.weight.flatten(1))
    for layer in (conv, linear):
        gradient = torch.randn(8, 36, generator=torch.Generator().manual_seed(1))
        layer.weight.grad = gradient.view_as(layer.weight)
        Muon([layer.weight], 0.1).step()
    torch.testing.assert_close(conv.weight.flatten(1), linear.weight)


def test_vectors_are_refused():
    with pytest.raises(ValueError, match=r"\(7,\)"):
        Muon([torch.nn.Parameter(torch.zeros(7))])


def test_matrices_of_many_shapes_are_updated_as_if_each_were_alone():
    shapes = [(8, 16), (16, 8), (8, 4, 2, 2), (16, 8), (4, 4), (32, 2, 2, 2)]
    generator = torch.Generator().manual_seed(0)
    together = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    alone = [torch.nn.Parameter(parameter.detach().clone()) for parameter in together]
    optimizers = [Muon(together, 0.1), *(Muon([parameter], 0.1) for parameter in alone)]
    for _ in range(3):
        for a, b in zip(together, alone):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(together, alone):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_iteration_is_in_bfloat16_where_that_is_fast(monkeypatch, dtype):
    fast = dtype == torch.bfloat16
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: fast)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: fast)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert iteration_dtype(torch.device("cuda")) == dtype
    assert iteration_dtype(torch.device("cpu")) == dtype
    assert iteration_dtype(torch.device("mps")) == torch.float32


def test_both_dtypes_of_the_iteration_give_nearly_the_same_matrices(monkeypatch):
    matrices = torch.randn(3, 32, 96, generator=torch.Generator().manual_seed(0))
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setattr(muon, "iteration_dtype", lambda device, dtype=dtype: dtype)
        results.append(orthogonalize(matrices))
    assert (results[0] - results[1]).norm() < 0.03 * results[0].norm()     # bfloat16: 8 bits


def test_a_parameter_without_gradient_stays():
    parameters = [torch.nn.Parameter(torch.ones(2, 3)) for _ in range(2)]
    optimizer = Muon(parameters, 0.1)
    optimizer.step()
    parameters[0].grad = torch.ones(2, 3)
    optimizer.step()
    assert not torch.equal(parameters[0], torch.ones(2, 3))
    assert torch.equal(parameters[1], torch.ones(2, 3))

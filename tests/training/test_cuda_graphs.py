"""Recording and replaying: the bookkeeping with a stand-in for the graph, the rest on a GPU."""

import contextlib

import pytest
import torch
from accelerate import Accelerator

from datasets.dishes import dish_names
from easy_diffusion import presets
from easy_diffusion.generate import generate_images, guided_denoiser
from easy_diffusion.networks.text_encoder import CharacterEncoder
from easy_diffusion.training.cuda_graphs import CudaGraphs, caption_inputs, has_caption_inputs
from easy_diffusion.training.trainer import train

NAMES = ["番茄炒鸡蛋", "土豆汤", "清炒青椒", "豆腐面"]


def record_on_cpu(function, generators, pool):
    """A stand-in for a CUDA graph: the replay calls the function and overwrites the outputs."""
    outputs = function().clone()
    return lambda: outputs.copy_(function()), outputs


def count_calls(calls):
    def double(inputs):
        calls.append(inputs["x"])
        return inputs["x"] * 2
    return double


# ---------------------------------------------------------------- the bookkeeping


def test_it_records_at_the_fourth_call_of_a_shape_and_reads_new_inputs():
    calls = []
    graphs = CudaGraphs(count_calls(calls), "cpu", record=record_on_cpu)
    for i in range(6):
        x = torch.full((2,), float(i))
        assert torch.equal(graphs({"x": x}), 2 * x)
        assert len(graphs.recordings) == (i >= 3)
    fixed = calls[3]
    assert all(x is fixed for x in calls[3:])           # recorded and replayed with fixed inputs
    assert all(x is not fixed for x in calls[:3])


def test_each_shape_and_dtype_is_counted_and_recorded_by_itself():
    graphs = CudaGraphs(count_calls([]), "cpu", record=record_on_cpu)
    for x in (torch.ones(2), torch.ones(3), torch.ones(2, dtype=torch.float64)):
        for factor in range(5):
            assert torch.equal(graphs({"x": factor * x}), 2 * factor * x)
    assert len(graphs.recordings) == 3


def test_more_shapes_than_the_limit_are_computed_without_a_recording(monkeypatch):
    monkeypatch.setattr("easy_diffusion.training.cuda_graphs.MAX_RECORDINGS", 2)
    graphs = CudaGraphs(count_calls([]), "cpu", record=record_on_cpu)
    for size in (1, 2, 3) * 5:
        x = torch.ones(size)
        assert torch.equal(graphs({"x": x}), 2 * x)
    assert len(graphs.recordings) == 2


def test_a_replay_restores_the_gradients_of_its_recording():
    weight = torch.nn.Parameter(torch.ones(1))

    def add_gradients(inputs):
        weight.grad = None
        loss = (weight * inputs["x"]).sum()
        loss.backward()
        return loss.detach()

    def record(function, generators, pool):
        outputs = function()
        gradient = weight.grad

        def replay():
            outputs.copy_(function())
            gradient.copy_(weight.grad)
        return replay, outputs

    graphs = CudaGraphs(add_gradients, "cpu", [weight], record=record)
    for _ in range(4):
        graphs({"x": torch.ones(3)})
    recorded = weight.grad
    weight.grad = None                                  # as another optimizer might do
    graphs({"x": torch.full((3,), 2.0)})
    assert weight.grad is recorded
    assert weight.grad.item() == 6


def test_a_function_that_waits_for_the_gpu_is_computed_and_a_warning_says_so(monkeypatch):
    modes = ["default"]
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)

    def wait(inputs):
        if modes[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation\nmore")
        return inputs["x"] * 2

    graphs = CudaGraphs(wait, "cuda", record=record_on_cpu)
    x = torch.ones(2)
    for _ in range(2):
        graphs({"x": x})
    with pytest.warns(UserWarning, match="without a CUDA graph: called a synchronizing CUDA oper"):
        assert torch.equal(graphs({"x": x}), 2 * x)
    assert torch.equal(graphs({"x": x}), 2 * x)
    assert modes == ["default", "error", "default"] and not graphs.recordings


# ---------------------------------------------------------------- captions


def test_padded_tokens_have_the_same_context():
    torch.manual_seed(0)
    encoder = CharacterEncoder("".join(NAMES), dim=16, heads=2, max_length=12).eval()
    for names, length in ((NAMES, 8), (["番茄炒鸡蛋番茄炒"], 12)):
        tokens = caption_inputs(encoder, names)["tokens"]
        assert tokens.shape[1] == length                # a multiple of 8, or the longest caption
        context, mask = encoder.encode(tokens)
        expected, expected_mask = encoder(names)
        longest = expected.shape[1]
        assert torch.equal(mask[:, :longest], expected_mask)
        assert not mask[:, longest:].any()
        torch.testing.assert_close(context[:, :longest][expected_mask], expected[expected_mask])


def test_an_encoder_without_parameters_to_train_gives_its_context():
    class Constant(torch.nn.Module):
        def forward(self, captions):
            return torch.ones(len(captions), 5, 3), torch.ones(len(captions), 5, dtype=torch.bool)

    assert has_caption_inputs(Constant())
    inputs = caption_inputs(Constant(), NAMES)
    assert inputs["context"].shape == (4, 8, 3)
    assert inputs["mask"].sum(1).tolist() == [5] * 4
    trained = Constant()
    trained.weight = torch.nn.Parameter(torch.ones(1))
    assert not has_caption_inputs(trained)
    assert has_caption_inputs(None) and caption_inputs(None, NAMES) == {}


# ---------------------------------------------------------------- on a GPU


def build():
    torch.manual_seed(0)
    return presets.build_networks("".join(dish_names("train")))


def start_training(steps, graphs, batches=None, **options):
    network, encoder, diffusion = build()
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8, generator=generator)
    options = presets.TRAINING | dict(steps=steps, graphs=graphs) | options
    return train(network, diffusion, batches or [(images, 2 * NAMES)], encoder, **options)


def test_a_hundred_losses_with_graphs_are_those_without(gpu):
    """In float32 with AdamW: rounding in bfloat16 and Muon's steps lead two trainings apart."""
    options = dict(accelerator=Accelerator(mixed_precision="no"), muon_learning_rate=None)
    losses = {}
    for graphs in (True, False):
        losses[graphs] = [step.loss for step in start_training(100, graphs, **options)]
    assert losses[True][:4] == pytest.approx(losses[False][:4], rel=1e-3)
    assert losses[True] == pytest.approx(losses[False], rel=0.02)
    assert sum(losses[True][-10:]) < 0.9 * sum(losses[True][:10])


def test_a_training_with_graphs_learns_as_one_without(gpu):
    """In bfloat16 with Muon; the mean of the last losses, as far as two trainings differ."""
    ends = []
    for graphs in (True, False):
        losses = [step.loss for step in start_training(100, graphs)]
        assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
        ends.append(sum(losses[-10:]))
    assert ends[0] == pytest.approx(ends[1], rel=0.3)


def test_replayed_gradients_are_those_of_the_eager_step(gpu):
    """Relative to the largest entry, to the rounding of bfloat16."""
    network, encoder, diffusion = build()
    torch.nn.init.normal_(network.conv_out.weight, std=0.05)
    generator = torch.Generator("cuda")
    parameters = list(network.cuda().parameters())
    encoder.cuda()

    def add_gradients(inputs):
        for parameter in parameters:
            parameter.grad = None
        x0, t, tokens = (
            inputs[name].to("cuda", non_blocking=True) for name in ("x0", "t", "tokens")
        )
        context, mask = encoder.encode(tokens)
        loss = diffusion.loss(network, x0, t, context, mask, generator)
        loss.mean().backward()
        return loss.detach()

    graphs = CudaGraphs(add_gradients, "cuda", parameters, [generator])
    for i in range(6):
        torch.manual_seed(i)
        inputs = {
            "x0": torch.randn(4, 3, 32, 32), "t": torch.randint(1000, (4,)),
            "tokens": encoder.tokenize(NAMES),
        }
        generator.manual_seed(i)
        losses = graphs(inputs).clone()
        gradients = [parameter.grad.clone() for parameter in parameters]
        generator.manual_seed(i)
        torch.testing.assert_close(losses, add_gradients(inputs), rtol=1e-4, atol=1e-5)
        for gradient, parameter in zip(gradients, parameters):
            scale = parameter.grad.abs().max()
            assert (gradient - parameter.grad).abs().max() <= 1e-3 * scale + 1e-7
    assert len(graphs.recordings) == 1


def test_a_batch_that_is_not_finite_changes_no_weight(gpu):
    good = torch.randn(8, 3, 32, 32)
    batches = [(good, 2 * NAMES)] * 6 + [(good * float("nan"), 2 * NAMES)] + [(good, 2 * NAMES)] * 9
    steps = start_training(7, True, batches, decay=0)
    for _ in range(6):
        step = next(steps)
    before = [weight.clone() for weight in step.ema_network.parameters()]
    with pytest.warns(UserWarning, match="step 6 is skipped"):
        step = next(steps)
    assert step.skipped == 1
    for weight, old in zip(step.ema_network.parameters(), before):
        assert torch.equal(weight, old)


def test_a_network_that_copies_a_value_to_the_cpu_trains_without_graphs(gpu):
    class Network(torch.nn.Conv2d):
        def forward(self, x_t, t, context, mask):
            return super().forward(x_t) * float(t.max() > -1)

    images = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8)
    _, _, diffusion = build()
    with pytest.warns(UserWarning, match="without a CUDA graph"):
        steps = list(train(Network(3, 3, 1), diffusion, [(images, NAMES)], steps=12))
    assert steps[-1].index == 11
    assert steps[-1].loss < steps[0].loss * 2


def test_replayed_samples_are_those_of_the_eager_sampler(gpu, monkeypatch):
    """25 steps of DDIM in float32, to one grey level."""
    monkeypatch.setattr("easy_diffusion.generate.autocast", lambda _: contextlib.nullcontext())
    network, encoder, diffusion = build()
    torch.nn.init.normal_(network.conv_out.weight, std=0.05)
    models = network.cuda().eval(), encoder.cuda().eval(), diffusion
    replayed = generate_images(*models, NAMES[:1], 32)
    monkeypatch.setattr("easy_diffusion.generate.CudaGraphs", lambda function, *_, **__: function)
    eager = generate_images(*models, NAMES[:1], 32)
    assert abs(replayed.astype(int) - eager.astype(int)).max() <= 1


def test_a_replayed_prediction_stays_when_the_next_is_computed(gpu):
    network, encoder, diffusion = build()
    torch.nn.init.normal_(network.conv_out.weight, std=0.05)
    denoise = guided_denoiser(network.cuda(), encoder.cuda(), diffusion, NAMES[:1], 2.0)
    t = torch.tensor([500], device="cuda")
    with torch.no_grad():
        for _ in range(3):
            first = denoise(torch.zeros(1, 3, 32, 32, device="cuda"), t)
        kept = first.x0.clone()
        other = denoise(torch.ones(1, 3, 32, 32, device="cuda"), t)
    assert torch.equal(first.x0, kept)
    assert not torch.equal(other.x0, kept)

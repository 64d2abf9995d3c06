import multiprocessing
import signal
import time

import lmdb
import numpy as np
import pytest
import torch
from accelerate import Accelerator

from datasets.dishes import Dishes
from datasets.latents_lmdb import LatentLmdb, encode_store
from datasets.lmdb_store import ImageCaptionStore, append_records
from easy_diffusion.diffusion.gaussian import GaussianDiffusion
from easy_diffusion.diffusion.guidance import guided
from easy_diffusion.diffusion.samplers import ddim, dpm_solver
from easy_diffusion.diffusion.schedule import NoiseSchedule
from easy_diffusion.latent_space import EncodingCollate, decode_to_uint8, fingerprint, make_encoder
from easy_diffusion.networks.autoencoder import Autoencoder, load_autoencoder, save_autoencoder
from easy_diffusion.networks.unet import UNet
from easy_diffusion.training.data_loader import make_loader
from easy_diffusion.training.trainer import train


@pytest.fixture(scope="module")
def autoencoder():
    torch.manual_seed(0)
    return Autoencoder((32, 32), blocks=1, patch=2, scale=1.7, shift=0.2).eval()


def write_images(folder, dishes):
    """Write a data set as an ImageCaptionStore."""
    for _ in append_records(folder, dishes):
        pass


@pytest.fixture
def images(tmp_path):
    """The folder of a store of 21 images."""
    write_images(tmp_path / "images", Dishes(21, 32))
    return tmp_path / "images"


def encode_all(images, folder, autoencoder, **options):
    """Encode a store, and return the counts that `encode_store` yields."""
    encode = make_encoder(autoencoder)
    key = fingerprint(autoencoder)
    return list(encode_store(images, folder, encode, key, batch_size=8, **options))


# ---------------------------------------------------------------- stored latents


def test_stored_latents_follow_the_posterior_with_new_eps_each_time(images, tmp_path, autoencoder):
    assert encode_all(images, tmp_path / "latents", autoencoder) == [8, 16, 21]
    assert encode_all(images, tmp_path / "latents", autoencoder) == []
    store = ImageCaptionStore(images)
    latents = LatentLmdb(tmp_path / "latents", fingerprint(autoencoder))
    torch.manual_seed(0)
    assert len(latents) == 21
    assert latents[3][1] == store[3][1]
    with torch.no_grad():
        posterior = autoencoder.encode(store[3][0][None].float() / 127.5 - 1)
    mean = (posterior.mean[0] - 0.2) * 1.7
    std = torch.exp(posterior.log_variance[0] / 2) * 1.7
    samples = torch.stack([latents[3][0] for _ in range(400)])
    assert samples.dtype == torch.float32
    # With 400 samples the mean's error is 0.04 standard deviations on average.
    assert float(((samples.mean(0) - mean) / std).abs().mean()) < 0.06
    assert float((samples.std(0) / std).mean()) == pytest.approx(1, abs=0.01)


def test_mirrored_images_are_encoded_too(images, tmp_path):
    def encode(batch):                                  # std = 0: only the mirroring is random
        return batch.float() / 8, torch.zeros(batch.shape)

    for _ in encode_store(images, tmp_path / "latents", encode, "an eighth", mirrored=True):
        pass
    image = ImageCaptionStore(images)[0][0].float() / 8
    latents = LatentLmdb(tmp_path / "latents")
    torch.manual_seed(0)
    samples = [latents[0][0] for _ in range(30)]
    original = sum(torch.equal(z, image) for z in samples)
    mirrored = sum(torch.equal(z, image.flip(2)) for z in samples)
    assert original + mirrored == 30
    assert min(original, mirrored) > 5


def test_an_interrupted_encoding_is_resumed(images, tmp_path, autoencoder):
    encode = make_encoder(autoencoder)
    key = fingerprint(autoencoder)
    encoding = encode_store(images, tmp_path / "interrupted", encode, key, batch_size=8)
    assert next(encoding) == 8
    encoding.close()
    assert encode_all(images, tmp_path / "interrupted", autoencoder) == [16, 21]
    encode_all(images, tmp_path / "complete", autoencoder)

    def sample(name, index):
        torch.manual_seed(index)
        return LatentLmdb(tmp_path / name)[index]

    for index in (0, 7, 8, 20):
        z, caption = sample("interrupted", index)
        expected_z, expected_caption = sample("complete", index)
        assert torch.equal(z, expected_z)
        assert caption == expected_caption


def encode_slowly(images, folder, progress):
    """Encode a store; progress: a shared integer, the number of latents that are committed."""

    def encode(batch):
        time.sleep(0.002)
        return batch[:, :1].float() / 7, batch[:, 1:2].float() / 9

    for count in encode_store(images, folder, encode, "slow", batch_size=4):
        progress.value = count


def test_killed_at_ten_random_moments_the_encoding_gives_the_same_store(tmp_path):
    """Killed by SIGKILL, between two transactions or within one: what was committed stays, nothing
    is encoded twice, and the finished store equals that of an uninterrupted encoding."""
    fork = multiprocessing.get_context("fork")
    rng = np.random.default_rng(0)
    counts = []                                         # of latents after each kill
    write_images(tmp_path / "images", Dishes(240, 32))
    encode_slowly(tmp_path / "images", tmp_path / "complete", fork.Value("i", 0))
    for _ in range(10):
        progress = fork.Value("i", 0)
        arguments = (tmp_path / "images", tmp_path / "killed", progress)
        process = fork.Process(target=encode_slowly, args=arguments)
        process.start()
        last_count = counts[-1] if counts else 0
        target_count = last_count + 4 * int(rng.integers(1, 6))
        while progress.value < target_count and process.is_alive():
            time.sleep(0.0005)
        time.sleep(float(rng.uniform(0, 0.01)))
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        counts.append(len(LatentLmdb(tmp_path / "killed")))
        assert counts[-1] >= progress.value
    assert counts == sorted(counts), counts
    assert len({count for count in counts if count < 240}) >= 5, counts

    encode_slowly(tmp_path / "images", tmp_path / "killed", fork.Value("i", 0))
    contents = []
    for name in ("complete", "killed"):
        with lmdb.open(str(tmp_path / name), readonly=True, lock=False) as environment:
            with environment.begin() as transaction:
                contents.append(list(transaction.cursor()))
    assert contents[0] == contents[1]
    assert len(contents[0]) > 240


def test_latents_from_a_different_autoencoder_are_refused(images, tmp_path, autoencoder):
    encode_all(images, tmp_path / "latents", autoencoder)
    other = Autoencoder((32, 32), blocks=1, patch=2, scale=1.7)
    assert fingerprint(other) != fingerprint(autoencoder)
    message = f"autoencoder {fingerprint(autoencoder)}, not of {fingerprint(other)}"
    with pytest.raises(ValueError, match=message):
        LatentLmdb(tmp_path / "latents", fingerprint(other))
    with pytest.raises(ValueError, match="mirrored=False, not of .*mirrored=True"):
        encode_all(images, tmp_path / "latents", autoencoder, mirrored=True)


def test_latents_of_other_images_are_refused(images, tmp_path, autoencoder):
    encode_all(images, tmp_path / "latents", autoencoder)
    for name, dishes in (("fewer", Dishes(5, 32)), ("others", Dishes(30, 32, seed=9))):
        write_images(tmp_path / name, dishes)
        with pytest.raises(ValueError, match=f"latents of other images than those of .*{name}"):
            encode_all(tmp_path / name, tmp_path / "latents", autoencoder)


def test_a_folder_without_latents_is_refused(images, tmp_path, autoencoder):
    encode_all(images, tmp_path / "latents", autoencoder)
    with pytest.raises(ValueError, match="not a latent store"):
        LatentLmdb(images)
    with pytest.raises(ValueError, match="not one that ImageCaptionStore"):
        ImageCaptionStore(tmp_path / "latents")
    with pytest.raises(FileNotFoundError, match="no latents in .*nowhere"):
        LatentLmdb(tmp_path / "nowhere")


def test_damaged_and_missing_latents_are_named(images, tmp_path, autoencoder):
    encode_all(images, tmp_path / "latents", autoencoder)
    with lmdb.open(str(tmp_path / "latents")) as environment:
        with environment.begin(write=True) as transaction:
            record = transaction.get(b"000000001")
            transaction.put(b"000000001", record[:-20])
            transaction.delete(b"000000002")
    latents = LatentLmdb(tmp_path / "latents")
    assert latents[0][0].shape == (4, 8, 8)
    for index, error in ((1, ValueError), (2, KeyError), (21, IndexError)):
        with pytest.raises(error, match=f"record {index} "):
            latents[index]


# ---------------------------------------------------------------- fingerprint


def test_the_fingerprint_stays_that_of_existing_latent_stores():
    autoencoder = Autoencoder((32, 32), blocks=1, patch=2, scale=1.7, shift=0.2)
    for parameter in autoencoder.parameters():
        torch.nn.init.constant_(parameter, 0.5)
    assert fingerprint(autoencoder) == "43a998bca1f6b4d7"


def test_a_saved_autoencoder_keeps_its_fingerprint(tmp_path, autoencoder):
    save_autoencoder(tmp_path / "a.safetensors", autoencoder)
    loaded = load_autoencoder(tmp_path / "a.safetensors")
    assert fingerprint(loaded) == fingerprint(autoencoder)
    assert (loaded.scale, loaded.shift) == (1.7, 0.2)
    with pytest.raises(FileNotFoundError):
        load_autoencoder(tmp_path / "b.safetensors")


# ---------------------------------------------------------------- encoding in the loader


def test_the_loader_encodes_in_its_own_process_and_in_workers(images, autoencoder):
    torch.manual_seed(0)
    store = ImageCaptionStore(images)
    latents, captions = next(iter(make_loader(store, 8, collate=EncodingCollate(autoencoder))))
    assert latents.shape == (8, 4, 8, 8)
    assert latents.dtype == torch.float32
    assert len(captions) == 8

    first_images = torch.stack([store[i][0] for i in range(8)])
    mean, std = make_encoder(autoencoder)(first_images)
    loader = torch.utils.data.DataLoader(
        store,
        8,
        num_workers=1,
        multiprocessing_context="spawn",
        collate_fn=EncodingCollate(autoencoder),
    )
    z, captions = next(iter(loader))
    assert captions == [store[i][1] for i in range(8)]
    eps = (z - mean) / std
    assert float(eps.square().mean()) == pytest.approx(1, abs=0.15)


def test_each_image_of_a_batch_is_encoded_with_its_own_eps_at_each_call(autoencoder):
    image, caption = Dishes(1, 32)[0]
    collate = EncodingCollate(autoencoder)
    z = torch.cat([collate([(image, caption)] * 4)[0] for _ in range(2)])       # [8, 4, 8, 8]
    mean, std = make_encoder(autoencoder)(image[None])
    eps = ((z - mean) / std).flatten(1)                                         # [8, 256]
    correlations = torch.corrcoef(eps) - torch.eye(8)
    assert correlations.abs().max() < 0.4                   # standard error: 1 / 16


def use_cuda(queue):
    try:
        torch.zeros(1, device="cuda")
        queue.put("works")
    except RuntimeError as error:
        queue.put(str(error))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_works_in_a_spawned_worker_and_not_in_a_forked_one(images, autoencoder):
    torch.zeros(1, device="cuda")
    results = {}
    for method in ("fork", "spawn"):
        context = multiprocessing.get_context(method)
        queue = context.Queue()
        process = context.Process(target=use_cuda, args=(queue,))
        process.start()
        results[method] = queue.get(timeout=60)
        process.join()
    assert "Cannot re-initialize CUDA in forked subprocess" in results["fork"]
    assert results["spawn"] == "works"
    collate = EncodingCollate(autoencoder, "cuda")
    loader = make_loader(ImageCaptionStore(images), 8, workers=1, collate=collate)
    assert next(iter(loader))[0].shape == (8, 4, 8, 8)


def test_training_guidance_and_samplers_work_on_latents(images, tmp_path, autoencoder):
    """Training on stored latents and on those that the loader encodes, then guidance, two samplers
    and decoding."""
    encode_all(images, tmp_path / "latents", autoencoder)
    diffusion = GaussianDiffusion(NoiseSchedule.cosine(100))
    network = UNet(in_channels=4, out_channels=4, channels=(32,), context_dim=None)
    stored = make_loader(LatentLmdb(tmp_path / "latents"), 8)
    encoded = make_loader(ImageCaptionStore(images), 8, collate=EncodingCollate(autoencoder))
    for loader in (stored, encoded):
        accelerator = Accelerator(mixed_precision="no")
        steps = list(train(network, diffusion, loader, steps=3, accelerator=accelerator))
        assert len(steps) == 3
        assert steps[-1].loss < 3
    network = steps[-1].ema_network.cpu()
    denoise = guided(diffusion.denoiser(network), diffusion.denoiser(network), 2.0)
    for sampler in (ddim, dpm_solver):
        generator = torch.Generator().manual_seed(0)
        sampling = sampler(denoise, diffusion.schedule, (2, 4, 8, 8), 4, generator=generator)
        with torch.no_grad():
            *_, last = sampling
        assert decode_to_uint8(autoencoder, last.x).shape == (2, 32, 32, 3)

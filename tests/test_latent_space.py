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
from easy_diffusion.diffusion.prediction import Prediction
from easy_diffusion.diffusion.samplers import ddim, dpm_solver
from easy_diffusion.diffusion.schedule import NoiseSchedule
from easy_diffusion.inpainting.latent_repaint import latent_mask, make_latent_inpainter
from easy_diffusion.latent_space import EncodingCollate, decode_to_uint8, fingerprint, make_encoder
from easy_diffusion.networks.autoencoder import Autoencoder
from easy_diffusion.networks.unet import UNet
from easy_diffusion.networks.weights_io import load_autoencoder, save_autoencoder
from easy_diffusion.training.data_loader import make_loader
from easy_diffusion.training.trainer import train


@pytest.fixture(scope="module")
def autoencoder():
    torch.manual_seed(0)
    return Autoencoder((32, 32), blocks=1, patch=2, scale=1.7, shift=0.2).eval()


@pytest.fixture
def pictures(tmp_path):
    for _ in append_records(tmp_path / "pictures", Dishes(21, 32)):
        pass
    return tmp_path / "pictures"


def encode_all(pictures, folder, autoencoder, **options):
    return list(encode_store(pictures, folder, make_encoder(autoencoder), fingerprint(autoencoder), batch=8, **options))


def test_latents_are_the_posteriors_and_drawn_anew_each_time(pictures, tmp_path, autoencoder):
    assert encode_all(pictures, tmp_path / "latents", autoencoder) == [8, 16, 21]
    assert encode_all(pictures, tmp_path / "latents", autoencoder) == []
    store, latents = ImageCaptionStore(pictures), LatentLmdb(tmp_path / "latents", fingerprint(autoencoder))
    torch.manual_seed(0)
    assert len(latents) == 21
    with torch.no_grad():
        posterior = autoencoder.encode(store[3][0][None].float() / 127.5 - 1)
    drawn = torch.stack([latents[3][0] for _ in range(400)])
    mean, deviation = (posterior.mean[0] - 0.2) * 1.7, torch.exp(posterior.log_variance[0] / 2) * 1.7
    assert drawn.dtype == torch.float32 and latents[3][1] == store[3][1]
    assert float(((drawn.mean(0) - mean) / deviation).abs().mean()) < 0.06  # 400 draws: a mean error of 0.04 deviations
    assert float((drawn.std(0) / deviation).mean()) == pytest.approx(1, abs=0.01)


def test_mirrored_pictures_are_encoded_too(pictures, tmp_path):
    def encode(pictures):                                                   # nothing is left to chance but which of the two it is
        return pictures.float() / 8, torch.zeros(pictures.shape)

    for _ in encode_store(pictures, tmp_path / "latents", encode, "an eighth", mirrored=True):
        pass
    picture, latents = ImageCaptionStore(pictures)[0][0].float() / 8, LatentLmdb(tmp_path / "latents")
    torch.manual_seed(0)
    seen = [latents[0][0] for _ in range(30)]
    as_it_is, turned = (sum(torch.equal(z, view) for z in seen) for view in (picture, picture.flip(2)))
    assert as_it_is + turned == 30 and min(as_it_is, turned) > 5


def test_an_interrupted_encoding_goes_on(pictures, tmp_path, autoencoder):
    walk = encode_store(pictures, tmp_path / "broken", make_encoder(autoencoder), fingerprint(autoencoder), batch=8)
    assert next(walk) == 8
    walk.close()
    assert encode_all(pictures, tmp_path / "broken", autoencoder) == [16, 21]
    encode_all(pictures, tmp_path / "whole", autoencoder)
    for i in (0, 7, 8, 20):
        drawn = []
        for name in ("broken", "whole"):
            torch.manual_seed(i)
            drawn.append(LatentLmdb(tmp_path / name)[i])
        assert torch.equal(drawn[0][0], drawn[1][0]) and drawn[0][1] == drawn[1][1]


def encode_slowly(pictures, folder, seen):
    def encode(some):
        time.sleep(0.002)
        return some[:, :1].float() / 7, some[:, 1:2].float() / 9
    for seen.value in encode_store(pictures, folder, encode, "slow", batch=4):
        pass


def test_killed_at_ten_random_moments_it_is_the_store_that_is_encoded_in_one_go(tmp_path):
    """By SIGKILL, between two transactions or within one; what was committed stays, and nothing is encoded twice."""
    fork, random, moments = multiprocessing.get_context("fork"), np.random.default_rng(0), []
    for _ in append_records(tmp_path / "pictures", Dishes(240, 32)):
        pass
    encode_slowly(tmp_path / "pictures", tmp_path / "whole", fork.Value("i", 0))
    for _ in range(10):
        seen = fork.Value("i", 0)
        process = fork.Process(target=encode_slowly, args=(tmp_path / "pictures", tmp_path / "broken", seen))
        process.start()
        until = (moments[-1] if moments else 0) + 4 * int(random.integers(1, 6))
        while seen.value < until and process.is_alive():
            time.sleep(0.0005)
        time.sleep(float(random.uniform(0, 0.01)))
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        moments.append(len(LatentLmdb(tmp_path / "broken")))
        assert moments[-1] >= seen.value
    assert moments == sorted(moments) and len({moment for moment in moments if moment < 240}) >= 5, moments
    encode_slowly(tmp_path / "pictures", tmp_path / "broken", fork.Value("i", 0))
    contents = []
    for name in ("whole", "broken"):
        with lmdb.open(str(tmp_path / name), readonly=True, lock=False) as environment, environment.begin() as transaction:
            contents.append(list(transaction.cursor()))
    assert contents[0] == contents[1] and len(contents[0]) > 240


def test_latents_of_another_autoencoder_are_refused(pictures, tmp_path, autoencoder):
    encode_all(pictures, tmp_path / "latents", autoencoder)
    other = Autoencoder((32, 32), blocks=1, patch=2, scale=1.7)
    assert fingerprint(other) != fingerprint(autoencoder)
    with pytest.raises(ValueError, match=f"autoencoder {fingerprint(autoencoder)}, not of {fingerprint(other)}"):
        LatentLmdb(tmp_path / "latents", fingerprint(other))
    for name, dishes in (("fewer", Dishes(5, 32)), ("others", Dishes(30, 32, seed=9))):
        for _ in append_records(tmp_path / name, dishes):
            pass
        with pytest.raises(ValueError, match=f"latents of other pictures than those of .*{name}"):
            encode_all(tmp_path / name, tmp_path / "latents", autoencoder)
    with pytest.raises(ValueError, match="mirrored=False, not of .*mirrored=True"):
        encode_all(pictures, tmp_path / "latents", autoencoder, mirrored=True)
    with pytest.raises(ValueError, match="not one of latents"):
        LatentLmdb(pictures)
    with pytest.raises(ValueError, match="not one that ImageCaptionStore"):
        ImageCaptionStore(tmp_path / "latents")
    with pytest.raises(FileNotFoundError, match="no latents in .*nowhere"):
        LatentLmdb(tmp_path / "nowhere")


def test_damaged_and_missing_latents_are_named(pictures, tmp_path, autoencoder):
    encode_all(pictures, tmp_path / "latents", autoencoder)
    with lmdb.open(str(tmp_path / "latents")) as environment, environment.begin(write=True) as transaction:
        transaction.put(b"000000001", transaction.get(b"000000001")[:-20])
        transaction.delete(b"000000002")
    latents = LatentLmdb(tmp_path / "latents")
    assert latents[0][0].shape == (4, 8, 8)
    for index, kind in ((1, ValueError), (2, KeyError), (21, IndexError)):
        with pytest.raises(kind, match=f"record {index} "):
            latents[index]


def test_a_saved_autoencoder_is_the_same(tmp_path, autoencoder):
    save_autoencoder(tmp_path / "a.safetensors", autoencoder)
    loaded = load_autoencoder(tmp_path / "a.safetensors")
    assert fingerprint(loaded) == fingerprint(autoencoder) and (loaded.scale, loaded.shift) == (1.7, 0.2)
    with pytest.raises(FileNotFoundError):
        load_autoencoder(tmp_path / "b.safetensors")


def test_the_loader_may_encode_in_its_place_and_in_workers(pictures, autoencoder):
    torch.manual_seed(0)
    store = ImageCaptionStore(pictures)
    latents, captions = next(iter(make_loader(store, 8, collate=EncodingCollate(autoencoder))))
    assert latents.shape == (8, 4, 8, 8) and latents.dtype == torch.float32 and len(captions) == 8
    mean, deviation = make_encoder(autoencoder)(torch.stack([store[i][0] for i in range(8)]))
    spawned = torch.utils.data.DataLoader(store, 8, num_workers=1, multiprocessing_context="spawn", collate_fn=EncodingCollate(autoencoder))
    z, names = next(iter(spawned))
    assert names == [store[i][1] for i in range(8)] and float(((z - mean) / deviation).square().mean()) == pytest.approx(1, abs=0.15)


def on_the_gpu(queue):
    try:
        torch.zeros(1, device="cuda")
        queue.put("works")
    except RuntimeError as error:
        queue.put(str(error))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a forked process loses CUDA only where there is CUDA")
def test_a_forked_worker_would_lose_cuda_and_a_spawned_one_has_it(pictures, autoencoder):
    torch.zeros(1, device="cuda")
    answers = {}
    for method in ("fork", "spawn"):
        context = multiprocessing.get_context(method)
        queue = context.Queue()
        process = context.Process(target=on_the_gpu, args=(queue,))
        process.start()
        answers[method] = queue.get(timeout=60)
        process.join()
    assert "Cannot re-initialize CUDA in forked subprocess" in answers["fork"] and answers["spawn"] == "works"
    loader = make_loader(ImageCaptionStore(pictures), 8, workers=1, collate=EncodingCollate(autoencoder, "cuda"))
    assert next(iter(loader))[0].shape == (8, 4, 8, 8)


def test_everything_that_works_in_pixels_works_in_latents(pictures, tmp_path, autoencoder):
    """Training on both kinds of loaders, guidance, two samplers, decoding."""
    encode_all(pictures, tmp_path / "latents", autoencoder)
    diffusion, network = GaussianDiffusion(NoiseSchedule.cosine(100)), UNet(in_channels=4, out_channels=4, channels=(32,), context_dim=None)
    kept, encoded = LatentLmdb(tmp_path / "latents"), ImageCaptionStore(pictures)
    for loader in (make_loader(kept, 8), make_loader(encoded, 8, collate=EncodingCollate(autoencoder))):
        steps = list(train(network, diffusion, loader, steps=3, accelerator=Accelerator(mixed_precision="no")))
        assert len(steps) == 3 and steps[-1].loss < 3
    network = steps[-1].network.cpu()
    denoise = guided(diffusion.denoiser(network), diffusion.denoiser(network), 2.0)
    for sampler in (ddim, dpm_solver):
        with torch.no_grad():
            *_, last = sampler(denoise, diffusion.schedule, (2, 4, 8, 8), 4, generator=torch.Generator().manual_seed(0))
        assert decode_to_uint8(autoencoder, last.x).shape == (2, 32, 32, 3)


def test_a_latent_is_repainted_where_any_of_its_pixels_is():
    mask = torch.zeros(1, 1, 16, 16, dtype=torch.bool)
    mask[0, 0, 3, 4] = mask[0, 0, 8:, :] = True
    expected = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    expected[0, 0, 0, 1] = expected[0, 0, 2:] = True
    assert torch.equal(latent_mask(mask, 4), expected)


def test_repainting_in_latents_keeps_the_rest_to_the_byte(autoencoder):
    asked = []

    def denoise(x_t, t):
        asked.append(x_t.shape)
        return Prediction(torch.zeros_like(x_t), x_t)

    picture = Dishes(1, 32)[0][0].permute(1, 2, 0).numpy()
    mask = np.zeros((32, 32), bool)
    mask[:, 20:] = True
    torch.manual_seed(0)
    painted = make_latent_inpainter(denoise, NoiseSchedule.cosine(100), autoencoder, steps=4, resamples=1)(picture, mask)
    assert asked[0] == (1, 4, 8, 8) and np.array_equal(painted[:, :20], picture[:, :20])
    nothing = decode_to_uint8(autoencoder, torch.zeros(1, 4, 8, 8))[0]              # far from the seam it is what the denoiser always says
    assert np.abs(painted[:, 28:].astype(int) - nothing[:, 28:]).mean() < np.abs(picture[:, 28:].astype(int) - nothing[:, 28:]).mean()

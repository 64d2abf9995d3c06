from easy_diffusion.training.distributed import fast_precision


def test_fast_precision_is_one_that_accelerate_knows():
    assert fast_precision() in ("bf16", "no")

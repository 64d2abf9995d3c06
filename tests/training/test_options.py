import pytest

from easy_diffusion.training.options import (
    AutoencoderOptions,
    OptimizerOptions,
    TrainingOptions,
    replace_options,
)


def test_options_are_sorted_into_their_groups_and_the_others_keep_their_defaults():
    options = replace_options(TrainingOptions(), steps=7, clip=0.5, patience=2, seed=3)
    assert options.run.steps == 7
    assert options.optimizer.clip == 0.5
    assert options.safety.patience == 2
    assert options.seed == 3
    assert options.optimizer.learning_rate == TrainingOptions().optimizer.learning_rate
    assert TrainingOptions().run.steps == 100_000          # the defaults are not changed


def test_a_group_may_be_given_as_a_whole_and_its_options_beside_it():
    group = OptimizerOptions(learning_rate=1e-2, clip=2.0)
    options = replace_options(TrainingOptions(), optimizer=group, clip=3.0)
    assert options.optimizer == OptimizerOptions(learning_rate=1e-2, clip=3.0)


def test_a_change_of_one_option_leaves_the_options_before_it_alone():
    before = replace_options(TrainingOptions(), clip=0.5, seed=3)
    after = replace_options(before, learning_rate=1e-2, warmup=5)
    assert (after.optimizer.clip, after.optimizer.learning_rate) == (0.5, 1e-2)
    assert (after.run.warmup, after.seed) == (5, 3)
    assert before.optimizer.learning_rate == 1e-4


@pytest.mark.parametrize("options", [TrainingOptions(), AutoencoderOptions()])
def test_an_unknown_option_raises_a_type_error_that_names_it(options):
    with pytest.raises(TypeError, match="no option 'lerning_rate'; did you mean 'learning_rate'"):
        replace_options(options, lerning_rate=1e-3)
    with pytest.raises(TypeError, match="no option 'xyz'; there are "):
        replace_options(options, xyz=1)

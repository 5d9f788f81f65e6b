import pytest
from scipy.stats import ttest_rel

from se_inject.comparison import Result, compare


def make(arm, seed, top1, hits=""):
    return Result(arm, seed, 50.0, top1, 10, 1.0, 1.0, hits, [])


def make_all(ours, theirs):
    pairs = zip(ours, theirs, strict=True)
    return [make(arm, i, x) for i, pair in enumerate(pairs) for arm, x in zip(("se", "control"), pair, strict=True)]


def test_several_seeds_give_students_interval_of_the_paired_differences():
    ours, theirs = [85.0, 85.4, 85.1], [84.0, 84.9, 84.3]
    found = compare(make_all(ours, theirs))
    expected = ttest_rel(ours, theirs).confidence_interval(0.95)
    assert found.points == pytest.approx(0.7667, abs=1e-4)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.basis == "over 3 seeds"


@pytest.mark.parametrize(
    ("ours", "theirs", "sentence"),
    [
        ([85.0, 85.12], [84.0, 84.1], "SE helped: +1.01 points (95 % interval +0.88 to +1.14, over 2 seeds)"),
        ([84.0, 84.1], [85.0, 85.12], "SE hurt: -1.01 points (95 % interval -1.14 to -0.88, over 2 seeds)"),
        (
            [85.0, 85.1],
            [84.0, 84.1],
            "SE made no difference that this comparison can tell: +1.00 points (no interval, the same with all 2 seeds)",  # noqa: E501
        ),
        (
            [85.0, 84.0],
            [84.0, 85.0],
            "SE made no difference that this comparison can tell: +0.00 points (95 % interval -12.71 to +12.71, over 2 seeds)",  # noqa: E501
        ),
    ],
)
def test_one_sentence_says_what_came_of_it(ours, theirs, sentence):
    assert str(compare(make_all(ours, theirs))) == sentence


def test_one_seed_gives_the_interval_over_the_images():
    ours, theirs = "1" * 90 + "0" * 10 + "2", "1" * 80 + "0" * 20 + "2"
    found = compare([make("se", 0, 90.0, ours), make("control", 0, 80.0, theirs)])
    # Half an image more of each kind: 1.96 * 100 / 102 * sqrt(10.5 + 0.5 - (10.5 - 0.5) ** 2 / 102)
    assert (found.points, found.low, found.high) == pytest.approx((10.0, 3.92, 16.08), abs=0.01)
    assert found.verdict == "helped"
    assert "--seeds 3" in found.basis


def test_networks_that_answer_alike_are_not_known_to_be_equal():
    found = compare([make("se", 0, 90.0, "1" * 9 + "0"), make("control", 0, 90.0, "1" * 9 + "0")])
    assert str(found).startswith(
        "SE made no difference that this comparison can tell: +0.00 points (95 % interval -16.33 to +16.33, over"
    )


def test_a_stream_of_one_seed_has_no_interval_and_says_so():
    found = compare([make("se", 0, 90.0), make("control", 0, 80.0)])
    assert str(found) == (
        "SE made no difference that this comparison can tell: +10.00 points "
        "(no interval, one seed; repeat with --seeds 3)"
    )

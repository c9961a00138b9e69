import pytest

from megatron_dapo.reward.overlong import overlong_penalty


@pytest.mark.parametrize(
    ("num_tokens", "expected"),
    [
        (0, 0.0),
        (16383, 0.0),
        (16384, 0.0),
        (16385, -1 / 4096),
        (18432, -0.5),
        (20479, -4095 / 4096),
        (20480, -1.0),
        (30000, -1.0),
    ],
)
def test_flagship_penalty(num_tokens, expected):
    assert overlong_penalty(num_tokens, max_tokens=20480, cache=4096) == expected


@pytest.mark.parametrize("num_tokens", [0, 99, 100, 101])
def test_no_cache_is_no_penalty(num_tokens):
    assert overlong_penalty(num_tokens, max_tokens=100, cache=0) == 0.0


def test_cache_of_the_whole_length_starts_at_the_first_token():
    assert [overlong_penalty(n, max_tokens=4, cache=4) for n in range(6)] == [
        0.0,
        -0.25,
        -0.5,
        -0.75,
        -1.0,
        -1.0,
    ]

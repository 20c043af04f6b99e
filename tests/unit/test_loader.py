import pytest

from rasengan.loader import prefetched


def test_batches_are_prepared_ahead_in_order():
    started = []

    def batches():
        for number in range(6):
            started.append(number)
            yield {"number": number}

    ahead = prefetched(batches(), depth=2)
    assert next(ahead) == {"number": 0}
    assert [batch["number"] for batch in ahead] == [1, 2, 3, 4, 5]
    assert started == list(range(6))


def test_an_error_while_preparing_a_batch_is_raised_at_that_batch():
    def batches():
        yield {"number": 0}
        raise OSError("gone")

    ahead = prefetched(batches())
    assert next(ahead) == {"number": 0}
    with pytest.raises(OSError, match="gone"):
        next(ahead)

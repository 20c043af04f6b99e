import errno

import pytest
import torch

from rasengan import UserError, endings


def failing(error):
    def run():
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("It is wrong. Mend it."), 2, "error: It is wrong. Mend it.\n"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "error: --here cannot be written or read: No space"),
        (torch.OutOfMemoryError(), 2, "error: The card's memory does not suffice."),
        (KeyboardInterrupt(), 130, "\nEnded by Ctrl-C."),
    ],
)
def test_an_error_of_the_user_is_one_line_and_a_code(capsys, error, code, said):
    assert endings.in_one_line(failing(error), "--here") == code
    assert capsys.readouterr().err.startswith(said)


@pytest.mark.parametrize("error", [ValueError("ours"), OSError(errno.EBADF, "Bad file descriptor")])
def test_an_error_of_ours_stays_one(error):
    with pytest.raises(type(error)):
        endings.in_one_line(failing(error), "--here")


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (1, 1)])
def test_a_code_is_handed_on(returned, code):
    assert endings.in_one_line(lambda: returned, "--here") == code

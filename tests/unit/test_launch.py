import pytest

from rasengan import UserError, processes


def test_a_plain_launch_is_accepted():
    processes.check_launch({})
    processes.check_launch({"ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_USE_FSDP": "false"})


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "true", "DeepSpeed.*distributed_type: MULTI_GPU"),
        ("ACCELERATE_USE_FSDP", "true", "FSDP.*distributed_type: MULTI_GPU"),
        ("ACCELERATE_USE_MEGATRON_LM", "True", "Megatron-LM.*distributed_type: MULTI_GPU"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "dynamo_backend to INDUCTOR.*Remove dynamo_config"),
    ],
)
def test_what_a_configuration_asks_for_and_does_not_get_is_refused(variable, value, words):
    with pytest.raises(UserError, match=words):
        processes.check_launch({variable: value})

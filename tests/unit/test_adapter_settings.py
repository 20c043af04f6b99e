"""What a stranger's settings of an adapter may say: nothing in them hangs a program, or ends it with a traceback."""

import copy
import json
import re
import signal

import pytest
import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file

from rasengan import UserError, adapters, components, fitting, merging
from rasengan.adapter_reader import read_adapter
from rasengan.adapters import PEFT_CONFIG, PEFT_FILE, PEFT_PREFIX


MODULES = [f"down_blocks.1.attentions.0.transformer_blocks.0.attn{n}.to_{x}" for n in "12" for x in "kqv"]
LAYOUTS = ["diffusers", "peft"]
# Matched with a name of forty letters, each would take hours.
ENDLESS = ["(.|.)*!", ".?" * 40 + "." * 40 + "!", "(.*.*.*.*.*.*.*.*.*.*)x_y", "(a+)+b", "(a{1,9}){1,9}b"]


@pytest.fixture(autouse=True)
def in_time():
    """No test here takes longer than a minute: a match that would never end is a failure."""

    def stop(number, frame):
        raise TimeoutError("it takes forever")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 60)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def unet(tiny_base):
    return components.load("unet", tiny_base / "unet")


@pytest.fixture
def stranger(unet, tmp_path):
    """Write an adapter with settings of a stranger's into a layout, as the JSON text that it is in the file."""

    def write(layout, text=None, **settings):
        said = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": MODULES} | settings
        weights = {}
        for module in MODULES:
            out, into = unet.get_submodule(module).weight.shape
            weights |= {f"{module}.lora_A.weight": torch.ones(2, into), f"{module}.lora_B.weight": torch.ones(out, 2)}
        if layout == "peft":
            (tmp_path / PEFT_CONFIG).write_text(json.dumps(said) if text is None else text)
            save_file({PEFT_PREFIX + key: tensor for key, tensor in weights.items()}, tmp_path / PEFT_FILE)
            return tmp_path
        said = json.dumps({f"unet.{name}": value for name, value in said.items()})
        metadata = {LORA_ADAPTER_METADATA_KEY: said if text is None else text}
        save_file({f"unet.{key}": tensor for key, tensor in weights.items()}, tmp_path / "a.safetensors", metadata)
        return tmp_path / "a.safetensors"

    return write


def merged(model, path):
    return merging.merge(copy.deepcopy(model), [(read_adapter(path), 1.0)], "unet")[0].state_dict()


# --- patterns ---


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "settings",
    [
        *({"target_modules": pattern} for pattern in [*ENDLESS, "a" * 10_001, "(", "to_q", "all-linear", ""]),
        *({"exclude_modules": value} for value in [*ENDLESS, "(", ["to_q"], True]),
        *({"layers_to_transform": [0], "layers_pattern": value} for value in [*ENDLESS, "(", 5, ["x", 5]]),
        *({"modules_to_save": [value]} for value in [*ENDLESS, "("]),
        {"layers_to_transform": "first"},
        {"layers_pattern": "x"},
        {"target_modules": "to_q", "layers_to_transform": [0]},
        {"target_modules": [f"x{n}" for n in range(20_000)]},
    ],
    ids=lambda settings: str(settings)[:60],
)
def test_what_a_training_adapted_is_told_by_the_weights_and_by_no_pattern(unet, stranger, layout, settings):
    adapter = read_adapter(stranger(layout, **settings))
    assert sorted(fitting.check_adapter(adapter.weights["unet"], adapter.configs["unet"], unet, "unet")) == MODULES


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("pattern", [*ENDLESS, "(", r"to_(q|k)", r"attn\d+", "to_q?", "[", "a\\"])
def test_a_pattern_of_ranks_or_alphas_is_names_alone(stranger, layout, name, pattern):
    path = stranger(layout, **{name: {"to_q": 2, pattern: 2}})
    with pytest.raises(UserError, match=f"{name} has {re.escape(repr(pattern)[:10])}.*Write the modules' names"):
        read_adapter(path)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_many_stars_in_many_patterns_are_soon_matched_or_refused(stranger, layout):
    assert read_adapter(stranger(layout, alpha_pattern={".*a" * 3000 + f"x{n}": 2 for n in range(50)}))
    with pytest.raises(UserError, match="alpha_pattern has 5,000 names with .* 1,000 are read at most"):
        read_adapter(stranger(layout, alpha_pattern={f".*x{n}": 2 for n in range(5000)}))


PATTERNS = [
    {"attn2.to_k": 7.0, "attn1.to_q": 0.1},
    {r"attn2\.to_k": 7.0, "to_k": 3.0},  # the first that fits
    {"^down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k": 7.0, "^attn1.to_q": 9.0, "attn1.to_v$": 8.0},
    {".*down_blocks.*to_v": 6.0, "to_.*": 2.0},
    {"^down.*attn1.*": 6.0, "n2.to_k": 5.0},
    {"down_blocks.1": 6.0, "": 5.0},
    {".*": 6.0},
]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_names_with_alphas_and_ranks_mean_the_modules_that_peft_means(tiny_base, unet, tmp_path, pattern):
    ranks = {name: max(1, int(alpha)) for name, alpha in pattern.items()}
    config = LoraConfig(r=4, lora_alpha=12, target_modules=["to_q", "to_k", "to_v"])
    config.rank_pattern, config.alpha_pattern = ranks, pattern
    model = get_peft_model(copy.deepcopy(unet), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = 0.05 * torch.randn(parameter.shape)
    model.save_pretrained(tmp_path)
    found = merged(unet, tmp_path)
    expected = PeftModel.from_pretrained(copy.deepcopy(unet), tmp_path).merge_and_unload().state_dict()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-5, atol=2e-6, msg=key)


def test_a_module_that_a_list_names_must_have_weights(tiny_base, unet, stranger):
    with pytest.raises(UserError, match=r"down_blocks\S+to_out.0 is targeted, but has no weights"):
        merged(unet, stranger("peft", target_modules=["to_q", "to_out.0"]))


# --- numbers and brackets ---


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "text",
    ["[" * 200_000, '{"unet.r": ' + "[" * 200_000, '{"unet.lora_alpha": ' + "9" * 5000 + "}", '{"r": ' + "9" * 5000],
    ids=["brackets", "brackets within", "digits", "more digits"],
)
def test_json_that_python_does_not_read_is_an_error_of_one_line(stranger, layout, text):
    path = stranger(layout, text)
    with pytest.raises(UserError) as error:
        read_adapter(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [10**400, 10**400 + 1, 2**63, 1e300])
@pytest.mark.parametrize("name", ["r", "lora_alpha", "rank_pattern", "alpha_pattern"])
def test_a_number_beyond_what_a_tensor_holds_is_refused_by_name(stranger, layout, name, value):
    path = stranger(layout, **{name: {"to_q": value} if "pattern" in name else value})
    with pytest.raises(UserError, match=f"{name} is .*, not .*positive .*numbers? below 2\\*\\*63") as error:
        read_adapter(path)
    assert len(str(error.value)) < 500


def test_the_settings_of_a_stranger_that_are_written_again_hold_no_pattern(stranger):
    said = {"exclude_modules": "x", "layers_pattern": ["("], "alpha_pattern": {"to_q": 3}}
    config = read_adapter(stranger("peft", target_modules="(.|.)*q", **said)).configs["unet"]
    assert config.target_modules == MODULES
    assert config.exclude_modules is config.layers_pattern is config.layers_to_transform is None
    assert config.alpha_pattern == {re.escape(module): 3 for module in MODULES if module.endswith("to_q")}
    assert adapters.alpha_of(config, MODULES[0]) == 4 - ("to_q" in MODULES[0])

"""A checkpoint of what is on the card, written while the card goes on."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file

from rasengan import checkpoint_writer, lora, optim


DEVICE = torch.device("cuda", 0)


@pytest.mark.parametrize("use_8bit_adam", [True, False])
def test_what_is_written_is_of_the_moment_of_the_call(use_8bit_adam, tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(4096, 4096)).to(DEVICE)
    inject_adapter_in_model(LoraConfig(r=64, lora_alpha=4, target_modules=["0"]), model)
    model.peft_config = {"default": LoraConfig(r=64, lora_alpha=4, target_modules=["0"])}
    flat = lora.flatten_parameters([p for p in model.parameters() if p.requires_grad])
    optimizer = optim.make_optimizer(flat, "adamw", use_8bit_adam, 1e-3, (0.9, 0.999), 0.01, 1e-8)
    ema = optim.make_ema(flat, 0.9)
    parts = {"optimizer": optimizer, "scaler": None, "models": {"unet": model}, "flat": flat, "ema": ema}
    writer = checkpoint_writer.CheckpointWriter(tmp_path, None, **parts)
    for step in range(1, 4):  # the later ones go into buffers that were used before
        flat.grad.normal_()
        optimizer.step()
        ema.step([flat])
        expected = flat.detach().clone(), ema.shadow_params[0].clone()
        moments = {n: t.clone() for n, t in optimizer.state[flat].items() if torch.is_tensor(t)}
        path = writer.save(step, {"samples_seen": step, "seed": 0})
        with torch.no_grad():
            flat.add_(1.0)
            ema.shadow_params[0].add_(1.0)
            for moment in moments:
                optimizer.state[flat][moment].zero_()
        writer.wait()
        for folder, values in ((path, expected[0]), (path / "ema", expected[1])):
            saved = load_file(folder / "pytorch_lora_weights.safetensors")
            assert torch.equal(torch.cat([tensor.flatten() for tensor in saved.values()]), values.cpu())
        state = torch.load(path / "optimizer.bin", weights_only=True)["state"][0]
        # bitsandbytes saves what is 8-bit in a dictionary of its own.
        state |= {
            name: tensor for value in state.values() if isinstance(value, dict) for name, tensor in value.items()
        }
        found = {name: state[name] for name in moments if name in state}
        assert len(found) >= 2
        assert all(torch.equal(tensor, moments[name].cpu()) for name, tensor in found.items())
        with torch.no_grad():  # what the next step goes on from
            flat.copy_(expected[0])
            for name, moment in moments.items():
                optimizer.state[flat][name].copy_(moment)

"""A base in 4 bits, under a LoRA."""

import torch
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn


def quantize_base(unet: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Quantize the linear layers of the transformer blocks to 4 bits (NF4, double quantization), one after the other.

    These are 87 % of the weights. What is left, convolutions and embeddings, keeps its precision.

    Args:
        unet: on the host, frozen, without a LoRA.
        device: where the quantized layers end.
        dtype: of the arithmetic.
    """
    import bitsandbytes

    for transformer in [module for module in unet.modules() if isinstance(module, Transformer2DModel)]:
        for name, layer in [(n, m) for n, m in transformer.named_modules() if type(m) is nn.Linear]:
            quantized = bitsandbytes.nn.Linear4bit(
                layer.in_features,
                layer.out_features,
                bias=layer.bias is not None,
                compute_dtype=dtype,
                compress_statistics=True,
                quant_type="nf4",
                device="meta",
            )
            quantized.weight = bitsandbytes.nn.Params4bit(
                layer.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4", module=quantized
            )
            quantized.bias = layer.bias
            quantized.support_avx512bf16_for_cpu = False  # else its forward repacks the weight, in place
            transformer.set_submodule(name, quantized.to(device))
    unet.is_loaded_in_4bit = True  # by this PEFT knows which kind of layer to wrap

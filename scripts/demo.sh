#!/usr/bin/env bash
# A whole run on the embedded tiny SDXL, by the same scripts as a real one: pictures, training, base and tuned side by
# side. Its weights are random, so it shows the machinery, not a style. `make demo` calls it.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-demo}
config=$(python -c 'import torch; print("single_t4" if torch.cuda.is_available() else "cpu")')

echo "--- 1/3  a tiny SDXL and 64 captioned pictures, in $out"
python -c "from rasengan import demo; demo.build_tiny_sdxl('$out/base'); demo.draw_picture_set('$out/pictures')"

echo "--- 2/3  training, with accelerate_configs/$config.yaml"
rm -rf "$out/lora"  # a fresh run does not mix its checkpoints with those of an earlier one
accelerate launch --config_file "accelerate_configs/$config.yaml" scripts/train_lora_sdxl.py \
    --pretrained_model_name_or_path "$out/base" --train_data_dir "$out/pictures" --output_dir "$out/lora" \
    --conditioning_cache_dir "$out/cache" --resolution 64 --train_batch_size 4 --max_train_steps 100 \
    --learning_rate 1e-3 --checkpointing_steps 50 --seed 0 --validation_epochs 4 --num_validation_images 1 \
    --validation_prompt "a red star on a green background" "a blue circle on a white background"

echo "--- 3/3  base and tuned, side by side"
python scripts/infer.py --pretrained_model_name_or_path "$out/base" --lora_weights "$out/lora" --compare \
    --prompt "a yellow square on a blue background" "a green triangle on a red background" \
    --num_images_per_prompt 2 --num_inference_steps 20 --output_dir "$out/images"

cat <<END

Done. What there is to see, and the command that opens each:
  adapter           $out/lora/pytorch_lora_weights.safetensors
                    .venv/bin/python scripts/infer.py --pretrained_model_name_or_path $out/base --lora_weights $out/lora --prompt "a star"
  base and tuned    $out/images/grid.png
                    xdg-open $out/images/grid.png
  TensorBoard log   $out/lora/logs
                    .venv/bin/tensorboard --logdir $out/lora/logs
The tiny SDXL has random weights, so its pictures are colored noise; what differs between the columns is the LoRA.
END

#!/usr/bin/env bash
# A whole run by the scripts of a real one, on the miniature SDXL that comes with the project: 200 pictures in a style
# that its UNet has never seen, training, base and tuned side by side for scenes that neither has seen. `make demo`
# calls it, with the folder for the results; what follows the folder is given to the training.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-demo}
shift || true
base=rasengan/assets/miniature
config=$(python -c 'import torch; print("single_t4" if torch.cuda.is_available() else "cpu")')

echo "--- 1/3  200 captioned pictures in an ink style, and four prompts that ask for none of them, in $out"
python - "$out" <<'PYTHON'
import sys
from pathlib import Path
from rasengan import world

out = Path(sys.argv[1])
world.write_style_set(out / "pictures")
captions = [scene.caption for scene in world.held_out_scenes(4, seed=1)]
(out / "prompts.txt").write_text("\n".join(captions) + "\n")
PYTHON

echo "--- 2/3  training, with accelerate_configs/$config.yaml"
rm -rf "$out/lora"  # a fresh run does not mix its checkpoints with those of an earlier one
accelerate launch --config_file "accelerate_configs/$config.yaml" scripts/train_lora_sdxl.py \
    --config rasengan/assets/recipe.yaml --pretrained_model_name_or_path $base --train_data_dir "$out/pictures" \
    --output_dir "$out/lora" --conditioning_cache_dir "$out/cache" --checkpointing_steps 450 --seed 0 "$@"

echo "--- 3/3  base and tuned, side by side"
python scripts/infer.py --pretrained_model_name_or_path $base --lora_weights "$out/lora" --compare \
    --prompt_file "$out/prompts.txt" --guidance_scale 2 --output_dir "$out/images"

cat <<END

Done, after $SECONDS seconds. What there is to see, and the command that opens each:
  adapter           $out/lora/pytorch_lora_weights.safetensors
                    .venv/bin/python scripts/infer.py --pretrained_model_name_or_path $base --lora_weights $out/lora --guidance_scale 2 --prompt "two blue stars at the top on a white background"
  base and tuned    $out/images/grid.png
                    xdg-open $out/images/grid.png
  TensorBoard log   $out/lora/logs
                    .venv/bin/tensorboard --logdir $out/lora/logs
To count style and content in pictures of 200 scenes, some minutes:
                    .venv/bin/python scripts/evaluate.py --lora_weights $out/lora --judge rasengan/assets --guidance_scale 2
END

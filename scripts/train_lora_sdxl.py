r"""Fine-tune Stable Diffusion XL to an art style with LoRA.

One 16 GB GPU without bf16, such as Colab's Tesla T4:

    accelerate launch --config_file accelerate_configs/single_t4.yaml scripts/train_lora_sdxl.py \
        --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 --variant fp16 \
        --dataset_name lambdalabs/naruto-blip-captions --train_batch_size 1 --max_train_steps 2000 \
        --validation_prompt "Bill Gates in naruto style" --output_dir naruto-lora

Eight GPUs: the same with `--config_file accelerate_configs/multi_gpu.yaml`. No GPU, to try things: `cpu.yaml`.
"""

import argparse
import contextlib
import gc
import logging
import math
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path


# Before PyTorch looks: it then grows its memory in place, and loses less between blocks of different sizes.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

from rasengan import imaging, stopping


if __name__ == "__main__":
    # Before the imports, which take long: meanwhile the launcher may die, and Ctrl-C needs no traceback of them.
    stopping.end_with_launcher(os.environ)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
# What is imported stays, and to look through it for garbage again and again takes a quarter of the imports' time.
gc.disable()

import torch
from accelerate.utils import ProjectConfiguration, set_seed
from diffusers.optimization import SchedulerType

from rasengan import (
    UserError,
    checkpoint,
    checkpoint_writer,
    component_checks,
    components,
    conditioning,
    data,
    diagnosis,
    export,
    held_out,
    hub,
    loader,
    locks,
    logs,
    lora,
    memory,
    memory_plan,
    nvrtc,
    optim,
    processes,
    quantization,
    resuming,
    samples,
    step,
    training_settings,
)
from rasengan.captions import read_captions, warn_of_long_captions
from rasengan.command_line import (
    Parser,
    conditioning_cache_dir,
    number_type,
    path_type,
    share_or_count_type,
    token_type,
    words_of_file,
)
from rasengan.endings import in_one_line, say_ended
from rasengan.processes import progress_bar
from rasengan.progress import Progress
from rasengan.rescue import Rescue
from rasengan.sources import COMPONENT_FLAGS, TEXT_ENCODERS, fetch, sources_of
from rasengan.validation_loss import ValidationLoss, resumed_record
from rasengan.validation_pictures import ValidationPictures, prompt_embeds


gc.freeze()
gc.enable()

logger = logging.getLogger(__name__)

MOST_RANK, MOST_ALPHA = 4096, 1e6  # far beyond what helps, and within what fp32 and a card hold

# --- the command line ---


def make_parser() -> Parser:
    """Return the parser; flags of diffusers' train_text_to_image_lora_sdxl.py keep their names and meanings."""
    parser = Parser(__doc__, "Defaults stand in brackets. A switch is negated by --no-..., such as --no-center_crop.")
    switch, count, amount = argparse.BooleanOptionalAction, number_type(1), number_type(0, float)

    parser.add_base_flags(COMPONENT_FLAGS)

    add = parser.add_data_flags(imaging.INTERPOLATIONS)
    add("--dataloader_num_workers", type=number_type(0), default=0, help="processes that load samples [%(default)s]")

    add = parser.add_argument_group("conditioning cache", "the encoders run once, and leave memory").add_argument
    add("--cache_conditioning", action=switch, default=True, help="off: the encoders run in the loop [on]")
    add("--conditioning_cache_dir", type=path_type, help="on a local disk; runs share it [~/.cache/rasengan]")
    add("--encode_batch_size", type=count, help="pictures encoded together [2 at 512 px, 1 at 1024]")

    add = parser.add_argument_group("LoRA").add_argument
    add("--rank", type=number_type(1, most=MOST_RANK), default=16, help="[%(default)s]")
    add("--lora_alpha", type=number_type(1e-8, float, most=MOST_ALPHA), help="the strength is alpha / rank [2 x rank]")
    add("--lora_dropout", type=amount, default=0.0, help="[%(default)s]")
    targets = list(lora.UNET_TARGETS)
    add("--lora_target_modules", nargs="+", default=targets, help=f"ends of names in the UNet [{' '.join(targets)}]")
    add("--lora_init", default="gaussian", choices=["gaussian", "default"], help="default: PEFT's [%(default)s]")
    add("--train_text_encoder", action=switch, default=False, help="train a LoRA on both text encoders too [off]")

    add = parser.add_argument_group("optimization", "a step is an optimizer step").add_argument
    add("--train_batch_size", type=count, default=16, help="samples on each GPU at once [%(default)s]")
    add("--gradient_accumulation_steps", type=count, default=1, help="micro-batches of a step [%(default)s]")
    add("--num_train_epochs", type=count, default=100, help="[%(default)s]")
    add("--max_train_steps", type=count, help="overrides --num_train_epochs")
    add("--optimizer", choices=[*optim.LEARNING_RATES], default="adamw", help="prodigy finds its rate [%(default)s]")
    add("--learning_rate", type=number_type(0, float, most=1e37), help="[1e-4; for prodigy a factor, 1]")
    add("--scale_lr", action=switch, default=False, help="multiply the rate by GPUs x accumulation x batch size [off]")
    schedules = [kind.value for kind in SchedulerType]
    add("--lr_scheduler", default="constant", choices=schedules, help="[%(default)s]")
    add("--lr_warmup_steps", type=number_type(0), default=500, help="of schedules that warm up [%(default)s]")
    add("--lr_num_cycles", type=count, default=1, help="of cosine_with_restarts [%(default)s]")
    add("--lr_power", type=amount, default=1.0, help="of polynomial [%(default)s]")
    add("--lr_step_rules", help="of piecewise_constant: '1:100,0.1' is a factor of 1 for 100 steps, then of 0.1")
    add("--use_8bit_adam", action=switch, default=True, help="AdamW with a quarter of the state's bytes [on]")
    add("--adam_beta1", type=amount, default=0.9, help="[%(default)s]")
    add("--adam_beta2", type=amount, default=0.999, help="[%(default)s]")
    add("--adam_weight_decay", type=amount, default=1e-2, help="[%(default)s]")
    add("--adam_epsilon", type=amount, default=1e-8, help="[%(default)s]")
    add("--max_grad_norm", type=number_type(1e-8, float), default=1.0, help="gradient clipping norm [%(default)s]")
    add("--use_ema", action=switch, default=False, help="save and draw with a moving average of the weights [off]")
    add("--ema_decay", type=amount, default=0.9999, help="of the average, which starts faster [%(default)s]")
    add("--seed", type=number_type(0, most=2**32 - 1), help="equal seeds give equal runs [drawn, and kept]")

    add = parser.add_argument_group("objective").add_argument
    add("--prediction_type", choices=["epsilon", "v_prediction"], help="[the scheduler's]")
    add("--snr_gamma", type=number_type(1e-8, float), help="min-SNR weights; the paper recommends 5 [none]")
    add("--noise_offset", type=amount, default=0.0, help="[%(default)s]")

    add = parser.add_argument_group("precision, memory and speed").add_argument
    add("--mixed_precision", choices=["no", "fp16", "bf16"], help="[the accelerate config's]")
    add("--gradient_checkpointing", action=switch, help="recompute all blocks, or none [as many as the memory needs]")
    add("--vram_budget_gib", type=number_type(0.5, float), help="GPU memory to use [what the card has left]")
    add("--plan_only", action=switch, default=False, help="print the memory plan, and stop [off]")
    quantized = "4-bit base weights; auto: where they do not fit otherwise [%(default)s]"
    add("--base_quantization", choices=["none", "nf4", "auto"], default="none", help=quantized)
    add("--cuda_graph", action=switch, default=True, help="start a step's kernels together [on]")
    add("--deterministic", action=switch, default=False, help="equal runs on one GPU give equal bits, slower [off]")
    add("--allow_tf32", action=switch, default=False, help="faster fp32 matrix products on Ampere and later [off]")
    add("--enable_xformers_memory_efficient_attention", action=switch, default=False, help="needs xformers [off]")
    add("--enable_npu_flash_attention", action=switch, default=False, help="needs an Ascend NPU [off]")
    add("--local_rank", type=int, default=-1, help="set by launchers; the environment's LOCAL_RANK wins")

    add = parser.add_argument_group("validation", "pictures of the base and of the current adapter").add_argument
    add("--validation_prompt", nargs="+", help="one or several prompts to draw [none]")
    add("--num_validation_images", type=count, default=4, help="for each prompt [%(default)s]")
    add("--validation_epochs", type=count, default=1, help="after epoch 1, and then every so many [%(default)s]")
    draw_steps = number_type(1, most=1000)
    add("--validation_inference_steps", type=draw_steps, default=25, help="denoising steps [%(default)s]")

    add = parser.add_argument_group("validation loss", "of pictures that are held out of training").add_argument
    share = "hold out a share, such as 0.05, or a number, such as 40 [none]"
    add("--validation_split", type=share_or_count_type, help=share)
    add("--validation_loss_steps", type=count, help="measure it every so many steps, and at both ends [each epoch]")
    add("--save_best", action=switch, default=False, help="keep the adapter of the lowest loss in best/ [off]")

    add = parser.add_argument_group("checkpoints and logs").add_argument
    add("--output_dir", type=path_type, default="sd-model-finetuned-lora", help="[%(default)s]")
    add("--checkpointing_steps", type=count, default=500, help="save every so many steps [%(default)s]")
    add("--checkpointing_minutes", type=amount, help="and every so many minutes [none]")
    add("--checkpoints_total_limit", type=count, help="keep only so many [all]")
    add("--resume_from_checkpoint", type=path_type, help="'latest', or the name of a checkpoint in --output_dir")
    add("--resume_with_changes", action=switch, default=False, help="resume though the result will differ [off]")
    add("--max_train_minutes", type=amount, help="end with a checkpoint after so many, as by Ctrl-C [none]")
    add("--logging_dir", type=path_type, default="logs", help="inside --output_dir [%(default)s]")
    add("--logging_steps", type=count, default=10, help="steps between two readings of the loss [%(default)s]")
    add("--report_to", default="tensorboard", help="a tracker of accelerate, all or none [%(default)s]")
    add("--debug_loss", action=switch, default=False, help="log each picture's loss, of the main process [off]")

    add = parser.add_argument_group("hub and configuration file").add_argument
    add("--push_to_hub", action=switch, default=False, help="upload the adapter and a model card [off]")
    add("--hub_token", type=token_type, help="[the one of `hf auth login`]")
    add("--hub_model_id", help="[the name of --output_dir]")
    add("--config", type=path_type, help="YAML file of these names and values; a flag on the command line wins")
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the arguments of the command line and of the file that its --config names."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.config:
        args = parser.parse_args(words_of_file(args.config, parser) + argv)
    args.local_rank = int(os.environ.get("LOCAL_RANK", args.local_rank))
    args.lora_alpha = args.lora_alpha or 2.0 * args.rank
    if args.learning_rate is None:
        args.learning_rate = optim.LEARNING_RATES[args.optimizer]
    args.conditioning_cache_dir = conditioning_cache_dir(args.conditioning_cache_dir, os.environ)
    return args


# --- the story ---


def train(args: argparse.Namespace, began_s: float, at_end: contextlib.ExitStack) -> int:
    """Train, leave the adapter in --output_dir, and return the exit code.

    Args:
        args: checked.
        began_s: when the run began, by the monotonic clock.
        at_end: runs what must happen however the run ends.
    """
    output_dir = Path(args.output_dir)
    resume_command = stopping.resume_command(sys.argv, stopping.launcher_words())  # later the launcher may be gone
    resume_from = checkpoint.find_checkpoint(output_dir, args.resume_from_checkpoint)

    # --- processes, precision, seed ---
    trackers = {"log_with": None if args.report_to == "none" else args.report_to}
    trackers["project_config"] = ProjectConfiguration(args.output_dir, str(output_dir / args.logging_dir))
    accelerator = processes.make_accelerator(os.environ, args.mixed_precision, **trackers)
    is_main = accelerator.is_main_process
    remedy = "Give every machine a copy of it, or an --output_dir that all share."
    processes.check_same("checkpoint in --output_dir", resume_from.name if resume_from else "none", remedy)
    device = processes.device_of(accelerator)
    args.mixed_precision = accelerator.mixed_precision
    args.num_processes = accelerator.num_processes
    args.global_batch = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    training_settings.check_same_everywhere(vars(args))
    weight_dtype = components.weight_dtype(args.mixed_precision, device)
    if args.seed is None:
        seed = checkpoint.read_state(resume_from)["seed"] if resume_from else random.randrange(2**31)
        args.seed = processes.as_on_main(lambda: seed, UserError)
        logger.info("The seed is %d, since no --seed was given", args.seed)
    if args.base_quantization == "auto" and accelerator.num_processes > 1:
        raise UserError("--base_quantization auto is for one process. Give nf4 or none.")
    if resume_from:
        if args.base_quantization == "auto":
            args.base_quantization = checkpoint.read_state(resume_from).get("base_quantization", "none")
        idle = training_settings.idle_settings(vars(args))
        resuming.check_resumable(resume_from, training_settings.public(vars(args)), args.resume_with_changes, idle)
    training_settings.choose_kernels(vars(args), device, os.environ)
    if args.vram_budget_gib and device.type == "cuda":  # what encodes the pictures keeps to it too
        memory.limit(args.vram_budget_gib, device, processes.sharing_a_gpu(os.environ))

    # --- pictures, captions, components: everything that can be wrong, before anything is loaded ---
    make_bar = partial(progress_bar, accelerator)
    with processes.one_goes_first(accelerator.is_local_main_process):
        _, dataset, pictures = data.find_pictures(vars(args), make_bar)
    dataset, pictures = data.leave_out_broken(dataset, pictures, args.skip_bad_images)
    captions = read_captions(dataset, args.caption_column, pictures)
    args.data_digest = data.data_digest(pictures, captions)
    remedy = "Give every machine the same data."
    processes.check_same("pictures and captions", f"those of digest {args.data_digest[:8]}", remedy)
    sizes = imaging.crop_sizes(args.resolution, args.bucket_step_px if args.aspect_ratio_buckets else None)
    if len(sizes) > 1:
        logger.info("Pictures by the size of their crop: %s", imaging.count_by_crop(pictures, sizes))
    rows = held_out.split(pictures, args.validation_split, args.seed)
    if args.validation_split is not None:
        copies = f"; left out as their copies: {len(rows.copies)}" if rows.copies else ""
        logger.info("%d of %d pictures are held out%s", len(rows.held_out), len(pictures), copies)
    steps_per_epoch = math.ceil(len(rows.trained) / args.global_batch)
    args.total_steps = max_train_steps = args.max_train_steps or args.num_train_epochs * steps_per_epoch
    sources = sources_of(vars(args))
    with processes.one_goes_first(accelerator.is_local_main_process):
        folders = component_checks.fetch_checked(sources)
        if args.lora_target_modules != list(lora.UNET_TARGETS):
            lora.check_targets(components.skeleton("unet", folders["unet"]), args.lora_target_modules)
        folders = {name: fetch(name, source) for name, source in sources.items()}
    args.base_digest = components.sampled_digest(folders, args.variant)
    processes.check_same("base", f"weights of digest {args.base_digest[:8]}", "Give every machine the same base.")
    warn_of_long_captions(captions, pictures, components.load("tokenizer", folders["tokenizer"]))
    if args.push_to_hub and is_main and not args.plan_only:
        hub_model_id = hub.create_repository(args.hub_model_id or output_dir.resolve().name, args.hub_token)
    scheduler = components.load_scheduler(folders["scheduler"], args.prediction_type)
    args.prediction_type = prediction_type = scheduler.config.prediction_type
    alphas_cumprod = components.noise_levels(scheduler).to(device)
    if resume_from:  # the settings that are known only now
        known_now = ("data_digest", "base_digest", "prediction_type", "total_steps", "lr_scheduler")
        settings = {name: getattr(args, name) for name in known_now}
        resuming.check_resumable(resume_from, settings, args.resume_with_changes)

    # --- the conditioning cache: encode once, then free the encoders; a plan needs no more than its shapes ---
    negative = components.negative_prompt(None, folders)
    texts = [*args.validation_prompt, *({negative} - {None})] if args.validation_prompt else []
    column, how = dataset[args.image_column], (device, processes.machine_share(os.environ), make_bar)
    latents = conditioning.prepare_latents(vars(args), column, pictures, sizes, folders["vae"], *how)
    prompts = conditioning.prepare_prompts(vars(args), captions, texts, folders, weight_dtype, *how)
    text_encoding = {"tokenizers": prompts.tokenizers, "text_encoders": prompts.text_encoders}  # in the loop

    # --- the LoRA ---
    set_seed(args.seed)  # lora_A is drawn from the global generator, equally in every process
    nvrtc.begin_to_compile(weight_dtype, device)
    unet = components.load("unet", folders["unet"], weight_dtype, args.variant)
    make_config = partial(lora.lora_config, args.rank, args.lora_alpha, dropout=args.lora_dropout, init=args.lora_init)
    with memory.must_fit(unet, device, is_quantized=args.base_quantization == "nf4"):
        if args.base_quantization == "nf4":
            quantization.quantize_base(unet, device, weight_dtype)
        lora.stack_weights(unet, device)
        unet.to(device)
        lora.add_lora(unet, make_config(target_modules=args.lora_target_modules))
    models = {"unet": unet}
    if args.train_text_encoder:
        models |= dict(zip(TEXT_ENCODERS, prompts.text_encoders, strict=True))
        for text_encoder in prompts.text_encoders:
            lora.add_lora(text_encoder, make_config(target_modules=lora.TEXT_ENCODER_TARGETS))
            if args.gradient_checkpointing is not False:
                # Later versions of transformers warn of the older name.
                name = "activation_checkpointing_enable"
                getattr(text_encoder, name, text_encoder.gradient_checkpointing_enable)()
    if args.enable_xformers_memory_efficient_attention:
        unet.enable_xformers_memory_efficient_attention()
    for model in models.values():
        model.train()
    flat = lora.flatten_parameters(lora.flat_order(*models.values()))

    # --- the step: forward and backward ---
    unet_run = step.prepare_unet(unet, flat, args.lora_alpha / args.rank, weight_dtype, args.deterministic)
    eager_because = step.why_eager(device, unet_run, args.train_text_encoder)
    as_graph = args.cuda_graph and eager_because is None
    if args.cuda_graph and not as_graph:
        logger.info("Steps run without a CUDA graph: %s", eager_because)
    objective = {"alphas_cumprod": alphas_cumprod, "prediction_type": prediction_type, "snr_gamma": args.snr_gamma}
    compute_losses = partial(step.compute_losses, unet, **objective, weight_dtype=weight_dtype)
    # The modules need autocast as PEFT wrote them, and so they run in evaluation mode.
    evaluate_losses = partial(compute_losses, autocast=weight_dtype != torch.float32)
    trained_losses = compute_losses if unet_run.is_fused else evaluate_losses
    train_step = step.TrainingStep(trained_losses, accelerator.backward, flat, as_graph)

    # --- the optimizer and its schedule, both over optimizer steps ---
    learning_rate = args.learning_rate * (args.global_batch if args.scale_lr else 1)
    optimizer = accelerator.prepare(training_settings.make_optimizer(vars(args), flat, learning_rate))
    ema = optim.make_ema(flat, args.ema_decay) if args.use_ema else None
    averaged = partial(optim.averaged, ema, flat)
    schedule = training_settings.schedule_of(vars(args), learning_rate, max_train_steps)

    # --- resume ---
    global_step, samples_seen, resumed = 0, 0, {}
    if resume_from:
        resumed = checkpoint.read_state(resume_from)
        make_like = partial(training_settings.make_optimizer, vars(args), learning_rate=learning_rate)
        may_lack = resumed.get("skipped_steps", 0) >= resumed["global_step"]
        check_state = partial(optim.check_state, optimizer.optimizer, make_like, may_lack)
        checkpoint.load_checkpoint(accelerator, optimizer, resume_from, models, flat, ema, check_state)
        global_step, samples_seen = resumed["global_step"], resumed["samples_seen"]
        resuming.say_resumed(resume_from, resumed, max_train_steps)
    elif args.resume_from_checkpoint:
        logger.info("There is no checkpoint in %s: starting afresh", output_dir)

    # --- data ---
    make_samples = partial(
        samples.TrainingSamples,
        *(column, pictures, captions, latents.rows, prompts.captions),
        seed=args.seed,
        sizes=sizes,
        interpolation=args.image_interpolation_mode,
        center_crop=args.center_crop,
        random_flip=args.random_flip,
        scaling_factor=components.read_config("vae", folders["vae"])["scaling_factor"],
        noise_offset=args.noise_offset,
        num_train_timesteps=len(alphas_cumprod),
    )
    training_set = make_samples(rows=rows.trained)
    encoding = text_encoding | {"vae": latents.vae, "trains_text": args.train_text_encoder}
    encode = partial(loader.encode_in_loop, device=device, **encoding, autocast_dtype=weight_dtype)

    # --- the memory plan: how many pictures at once, and how many blocks are recomputed ---
    samples_per_process = args.global_batch // accelerator.num_processes
    plan = memory_plan.Plan(args.train_batch_size, unet_run.blocks if args.gradient_checkpointing else 0)
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else None  # a plan holds for one kind
    planner = None
    if device.type == "cuda":
        planner = training_settings.make_planner(
            vars(args),
            lambda size: train_step.run(next(encode([samples.first_batch(training_set, size)]))),
            unet_run.recompute_blocks,
            flat,
            optimizer.optimizer,
            samples=samples_per_process,
            blocks=unet_run.blocks,
            sharing=processes.sharing_a_gpu(os.environ),
        )
        remembered = resuming.plan_to_keep(resumed, vars(args), card)
        plan = processes.as_on_main(partial(planner.plan, remembered), UserError)
        if is_main:
            cached_bytes = conditioning.disk_bytes(latents.rows, prompts.captions, prompts.validation)
            print(planner.describe(plan, unet, [latents.vae, *prompts.text_encoders], cached_bytes), flush=True)
    if args.base_quantization == "auto":
        args.base_quantization = "none"  # it fits
    if args.plan_only:
        return 0
    if resume_from and args.lora_dropout and not args.resume_with_changes:
        resuming.check_samples_at_once(resume_from, plan.micro_batch_size)
    unet_run.recompute_blocks(plan.recomputed_blocks)
    train_step.samples, train_step.micro_batch_size = samples_per_process, plan.micro_batch_size

    accumulation_steps = samples_per_process // plan.micro_batch_size
    split = (accumulation_steps, accelerator.num_processes, accelerator.process_index)
    stream = samples.sample_stream(
        training_set.buckets(), args.seed, plan.micro_batch_size, *split, samples_seen, max_train_steps - global_step
    )
    batches = encode(loader.load(training_set, stream, args.dataloader_num_workers, device.type == "cuda"))

    # --- what the run writes, and the base model's pictures and loss ---
    settings = training_settings.public(vars(args))
    if is_main:
        training_settings.write(settings, output_dir)
    logs.begin_trackers(accelerator, settings, output_dir / args.logging_dir)
    # From here on a signal or the deadline ends what is being done in order.
    stopper = stopping.Stopper(args.max_train_minutes, began_s, stopping.tell)
    at_end.callback(stopper.release)
    ballot, is_stopping, adapted = processes.Ballot(), False, list(models.values())
    parts = {"optimizer": optimizer, "scaler": accelerator.scaler, "models": models, "flat": flat, "ema": ema}
    parts["check_held"] = partial(locks.check_held, output_dir)
    writer = checkpoint_writer.CheckpointWriter(output_dir, args.checkpoints_total_limit, **parts)
    at_end.callback(writer.close)
    if args.validation_prompt:
        pictures_shown = ValidationPictures(
            accelerator,
            unet,
            latents.vae or components.load("vae", folders["vae"], variant=args.variant),
            scheduler,
            partial(prompt_embeds, accelerator=accelerator, cached=prompts.validation, **text_encoding),
            prompts=args.validation_prompt,
            negative=negative,
            seeds=[args.seed + number for number in range(args.num_validation_images)],
            side_px=args.resolution,
            num_inference_steps=args.validation_inference_steps,
            file=output_dir / "validation.png",
        )
    validation_loss = ValidationLoss(
        make_samples(rows=rows.held_out),
        partial(encode, trains_text=False),
        partial(evaluate_losses, snr_gamma=None),  # without weights, so that runs compare
        train_step.release,
        device=device,
        share=(accelerator.process_index, accelerator.num_processes),
        batch_size=plan.micro_batch_size,
        every=args.validation_loss_steps or steps_per_epoch,
        should_stop=stopper.due,
        record=resumed_record(resumed, vars(args), output_dir if args.save_best else None),
    )

    def note_loss() -> None:
        """Measure the loss of the held-out pictures, show it, and keep the adapter if it is the best so far."""
        accelerator.log(validation_loss.measure_tuned(global_step), step=global_step)
        if args.save_best and is_main and validation_loss.is_best(global_step):
            writer.save_best(global_step, validation_loss.record["best"])

    try:
        with lora.evaluating(adapted), lora.adapters_disabled(adapted):
            if args.validation_prompt:
                pictures_shown.draw_base(stopper.due)
            if rows.held_out and validation_loss.record["base"] is None:
                accelerator.log(validation_loss.measure_base(), step=0)
    except stopping.Interrupted:
        is_stopping = True
    except imaging.PictureChanged as error:
        raise UserError(loader.picture_changed(error, checkpoint.last_name(output_dir))) from error

    # What every checkpoint says of the run; the record is the live one.
    state = settings | {"memory_plan": list(plan), "card": card, "validation_losses": validation_loss.record}
    counts = f"{len(rows.trained)} pictures, {max_train_steps} steps of {args.global_batch}"
    logger.info(f"{counts}; {flat.numel():,} trainable parameters")

    # --- the loop ---
    memory.reset_peak(device)
    at_end.callback(loader.end_workers)
    progress = Progress(global_step, args.global_batch, device, resumed)
    bar = make_bar("Steps", max_train_steps, global_step)
    at_end.callback(bar.close)  # an error has a line of its own
    first_step, saved_s = global_step, time.monotonic()
    rescue = Rescue(accelerator, writer, progress, state, train_step.release, planner, plan)

    @contextlib.contextmanager
    def aside() -> Iterator[None]:
        """Measure or draw between two steps, with the weights that are saved; a run that is to end leaves off."""
        nonlocal is_stopping
        try:
            with rescue.before_errors(), progress.paused(), lora.evaluating(adapted), averaged():
                yield
        except stopping.Interrupted:
            rescue.save()
            is_stopping = True

    while global_step < max_train_steps and not is_stopping:
        # After the checkpoint of the step: a run that ends in between measures when it is resumed.
        if validation_loss.due(global_step):
            with aside():
                note_loss()
            if is_stopping:
                break
        step.seed_step(args.seed, global_step, accelerator.process_index)
        step_loss, names = torch.zeros((), device=device), []
        with rescue.before_errors():
            while len(names) < samples_per_process:
                batch = next(batches)
                names += batch["name"]
                losses = train_step(batch)
                step_loss += losses.sum() / samples_per_process
                if args.debug_loss:
                    logs.log_each_loss(accelerator, batch["name"], losses, args.train_data_dir, global_step + 1)
            processes.average(flat.grad, step_loss)
        with rescue.before_errors(is_whole=False):
            grad_norm = accelerator.clip_grad_norm_([flat], args.max_grad_norm)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * schedule(global_step)
            optim.step_if_finite(optimizer, grad_norm, accelerator.scaler)
            flat.grad.zero_()  # in place: the parameters' gradients are views of it
            if ema is not None:
                ema.step([flat])
        global_step += 1
        unread = progress.add(step_loss, grad_norm)
        bar.update()
        writer.check()

        # Reading a loss waits for the card, so several are read together.
        is_last, minutes = global_step == max_train_steps, (time.monotonic() - saved_s) / 60
        is_late = args.checkpointing_minutes is not None and minutes >= args.checkpointing_minutes
        with rescue.before_errors():
            is_stopping, is_late = ballot.any(stopper.due(), is_main and is_late)
        saves = global_step % args.checkpointing_steps == 0 or is_late or is_stopping or is_last
        if unread >= args.logging_steps or saves:
            is_first_reading = progress.step == first_step
            progress.log(accelerator)
            accelerator.log({"lr": group["lr"] * group.get("d", 1.0)}, step=global_step)  # d is Prodigy's
            shown = {"loss": f"{progress.train_loss:.4f}", "images_per_s": f"{progress.images_per_second:.2f}"}
            bar.set_postfix(shown | validation_loss.shown())
            if plan.predicted_bytes and is_first_reading:
                logger.info("Measured peak: %.2f GiB", memory.peak_reserved_gib(device))
            if progress.skipped_in_a_row >= diagnosis.MOST_SKIPPED or (progress.is_stuck() and is_last):
                train_step.release()
                # The weights of a checkpoint are good where a later step had a finite gradient.
                good = checkpoint.last_name(output_dir, before=global_step - progress.skipped_in_a_row)
                facts = (global_step, progress.skipped_in_a_row, good)
                raise UserError(diagnosis.explain(unet, flat, batch, names, evaluate_losses, weight_dtype, *facts))
        if saves and progress.is_stuck():
            logger.warning("No checkpoint of step %d: the last steps had no finite loss", global_step)
        elif saves and is_main:
            with progress.paused():
                path = writer.save(global_step, state | progress.kept(), keep_all=progress.is_doubtful())
            logger.info("Saving %s", path)
            saved_s = time.monotonic()
        epoch, rest = divmod(global_step, steps_per_epoch)
        shows = rest == 0 and (epoch - 1) % args.validation_epochs == 0 and not (is_last or is_stopping)
        if args.validation_prompt and shows:
            with aside():
                train_step.release()
                pictures_shown.show(global_step, stopper.due)
    bar.close()
    train_step.release()
    writer.wait()
    progress.warn_of_skipped()
    if global_step < max_train_steps:
        accelerator.end_training()
        if is_main:
            steps = f"after {global_step} of {max_train_steps} steps"
            stopper.say_ended(steps, resume_command, did_nothing=global_step == first_step)
        return stopper.exit_code()

    def first_loss() -> torch.Tensor:
        return evaluate_losses(next(encode([samples.first_batch(training_set, plan.micro_batch_size)])))

    with lora.evaluating(adapted), averaged():  # before an older checkpoint is removed
        diagnosis.check_not_ruined(first_loss, partial(lora.adapters_disabled, adapted), output_dir)
    if rows.held_out:
        with validation_loss.after_last_step():
            with lora.evaluating(adapted), averaged():
                note_loss()
            logger.info(validation_loss.summary())
            diagnosis.refuse_ruined(validation_loss.record["last"], validation_loss.record["base"], output_dir)
    if is_main and not progress.is_doubtful():
        writer.finish()

    # --- save, verify, show ---
    if is_main:
        locks.check_held(output_dir)
        with averaged():
            export.publish(output_dir, models, checkpoint.last_name(output_dir))
        training_settings.write(settings, output_dir, optimizer_steps=global_step)
        logger.info("Saved and verified %s and %s", output_dir / export.DIFFUSERS_FILE, output_dir / "peft")
    was_asked, is_over = ballot.any(stopper.asked(), stopper.due())
    stopper.release()  # what comes now may be lost
    if args.validation_prompt and not is_over:
        with lora.evaluating(adapted), averaged():
            pictures_shown.show(global_step)
    if is_main:
        hub.write_model_card(output_dir, settings | {"optimizer_steps": global_step})
        if args.push_to_hub and was_asked:
            logger.warning("Not uploaded, since a signal came: resume from 'latest' with --push_to_hub")
        elif args.push_to_hub:
            hub.upload(hub_model_id, args.hub_token, output_dir, bool(args.validation_prompt))
    accelerator.end_training()
    if is_main and was_asked:
        stopper.say_ended("before all was measured and shown", resume_command)
    return stopper.exit_code()


def train_in_what_fits(args: argparse.Namespace, began_s: float, at_end: contextlib.ExitStack) -> int:
    """Train, with a quantized base where that was allowed and the memory needs it, and return the exit code."""
    try:
        return train(args, began_s, at_end)
    except memory.DoesNotFit as error:
        if args.base_quantization != "auto":
            raise
        logger.info("%s: the base is quantized to nf4 now", str(error).split(". ")[0])
    args.base_quantization = "nf4"
    memory.give_back()  # the first try's, which the exception held
    return train(args, began_s, at_end)


def main(args: argparse.Namespace) -> int:
    """Check the arguments, train alone in --output_dir, and return the exit code."""
    began_s = time.monotonic()
    components.disable_progress_bars()
    logs.begin([logger.name, "rasengan"], speaks=os.environ.get("LOCAL_RANK", "0") == "0")
    training_settings.check(vars(args), os.environ)
    if idle := training_settings.idle_flags(vars(args), make_parser().get_default):
        logger.info("Without effect beside the other flags: %s", ", ".join(idle))
    only_run = locks.only_run(Path(args.output_dir), is_first=os.environ.get("RANK", "0") == "0")
    with only_run, contextlib.ExitStack() as at_end:
        return train_in_what_fits(args, began_s, at_end)


def run(argv: list[str] | None = None) -> int:
    """Train by a command line, say in one line what is wrong, and return the exit code."""
    places, go_on = "--output_dir or --conditioning_cache_dir", "Then go on with --resume_from_checkpoint latest."
    signal.signal(signal.SIGINT, signal.default_int_handler)
    stopping.raise_on_sigterm()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        stopping.end_while_waiting(partial(say_ended, go_on))
    return in_one_line(lambda: main(parse_args(argv)), places, int(os.environ.get("RANK", 0)), go_on)


if __name__ == "__main__":
    processes.end(run())

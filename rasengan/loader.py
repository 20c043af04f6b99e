"""Batches on their way to the step: prepared ahead by processes or a thread, and encoded where no cache holds them."""

import multiprocessing
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from rasengan import first_line, sdxl
from rasengan.imaging import PictureChanged


class WorkerDied(Exception):
    """A process that loads samples has ended without warning."""


def collate(samples: list[dict]) -> dict:
    """Stack the tensors of the samples, and list what is no tensor."""
    return {
        key: torch.stack([sample[key] for sample in samples]) if torch.is_tensor(value) else [s[key] for s in samples]
        for key, value in samples[0].items()
    }


def load(
    training_set: torch.utils.data.Dataset, stream: Iterable[list], workers: int, pin_memory: bool
) -> Iterator[dict]:
    """Yield the batches of a stream, prepared by so many processes, or by a thread where there are none."""
    loader = torch.utils.data.DataLoader(
        training_set,
        batch_sampler=stream,
        collate_fn=collate,
        generator=torch.Generator(),  # else the loader draws from the global one, after the step has seeded it
        num_workers=workers,
        worker_init_fn=ignore_signals,
        pin_memory=pin_memory,
    )
    return prefetched(iter(loader))


def prefetched(batches: Iterator[dict], depth: int = 2) -> Iterator[dict]:
    """Yield the batches while a thread prepares the next ones, so that the card need not wait for them."""
    with ThreadPoolExecutor(1) as pool:
        waiting = deque(pool.submit(next, batches, None) for _ in range(depth))
        while (batch := _result(waiting.popleft())) is not None:
            waiting.append(pool.submit(next, batches, None))
            yield batch


def _result(future: Future) -> dict | None:
    try:
        return future.result()
    except PictureChanged as error:
        # From another process it comes with that one's traceback before it.
        raise PictureChanged(str(error).rpartition("PictureChanged: ")[2].strip()) from error
    except (RuntimeError, EOFError, OSError) as error:
        # PyTorch says so itself, unless the worker died while it handed something over.
        from_handing_over = isinstance(error, EOFError | ConnectionError | FileNotFoundError)
        if "DataLoader worker" in str(error) or (from_handing_over and getattr(error, "filename", None) is None):
            raise WorkerDied(first_line(error).rstrip(".")) from error
        raise


def ignore_signals(_worker: int) -> None:
    """Leave Ctrl-C and SIGTERM, which reach all processes of a terminal or a job, to the training process."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def end_workers() -> None:
    """End the processes that load samples, where an error left them: Python would ask them by SIGTERM, and wait.

    To be called while nobody handles SIGCHLD.
    """
    for worker in multiprocessing.active_children():
        worker.kill()
        worker.join()


def worker_died(error: WorkerDied, global_step: int, saved: str) -> str:
    """Return what to say of it after `global_step` steps; `saved` names the last checkpoint, empty for none."""
    return (
        f"A process that loads samples ended in step {global_step + 1}: {error}. Resume from {saved or 'the start'}, "
        "with --resume_from_checkpoint latest. If the host's memory ran out, lower --dataloader_num_workers."
    )


def picture_changed(error: PictureChanged, saved: str) -> str:
    """Return what to say of it; `saved` names the last checkpoint, empty for none."""
    return (
        f"{error} Put back what it was, but for the cache, which is built again, and resume from "
        f"{saved or 'the start'} with --resume_from_checkpoint latest."
    )


def encode_in_loop(
    batches: Iterable[dict],
    device: torch.device,
    vae: torch.nn.Module | None,
    tokenizers: list,
    text_encoders: list,
    trains_text: bool,
    autocast_dtype: torch.dtype,
) -> Iterator[dict]:
    """Yield the batches on the device, with latents and embeddings encoded now where no cache held them.

    Args:
        batches: as `collate` returns them.
        device: to train on, and on which the encoders are.
        vae: fp32; None where every batch has its latents.
        tokenizers: both; empty where every batch has its embeddings.
        text_encoders: likewise.
        trains_text: keep what the text encoders' own gradient needs.
        autocast_dtype: of the text encoders' arithmetic.
    """
    for batch in batches:
        batch = {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()}
        if "pixel_values" in batch:
            with torch.no_grad():
                mean, std = sdxl.encode_pictures(vae, batch.pop("pixel_values"))
            batch["latents"] = (mean + std * batch.pop("latent_noise")) * vae.config.scaling_factor
        if "caption" in batch:
            under_autocast = torch.autocast(device.type, autocast_dtype, enabled=autocast_dtype != torch.float32)
            with torch.set_grad_enabled(trains_text), under_autocast:
                embeds = sdxl.encode_prompts(batch.pop("caption"), tokenizers, text_encoders)
            batch["prompt_embeds"], batch["pooled_prompt_embeds"] = embeds
        yield batch

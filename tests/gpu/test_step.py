"""The captured step against the eager one, on the tiny UNet in fp16."""

import bisect
import contextlib
import functools
import os

import pytest
import torch

from rasengan import components, fused, graphs, kernels, lora, memory, memory_plan, optim, quantization, step
from rasengan.demo import build_tiny_sdxl
from rasengan.side_stream import SideStream


os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once, by the first product of the process

DEVICE = torch.device("cuda", 0)
RANK, ALPHA = 4, 8.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("tiny") / "base"
    build_tiny_sdxl(made)
    return made


def load(folder, dtype=torch.float16, quantize=False, rank=RANK):
    unet = components.load("unet", folder / "unet", dtype)
    if quantize:
        quantization.quantize_base(unet, DEVICE, dtype)
    lora.stack_weights(unet, DEVICE)
    unet.to(DEVICE)
    torch.manual_seed(0)
    lora.add_lora(unet, lora.lora_config(rank, ALPHA, list(lora.UNET_TARGETS)))
    flat = lora.flatten_parameters(lora.flat_order(unet))
    with torch.no_grad():
        flat += 0.02 * torch.randn(flat.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    unet.train()
    return unet, flat, fused.FusedUNet(unet, flat, ALPHA / rank)


def make_step(unet, flat, as_graph, scale=64.0, dtype=torch.float16, autocast=False):
    scheduler = torch.linspace(0.999, 0.005, 1000, device=DEVICE)
    compute = functools.partial(
        step.compute_losses,
        unet,
        alphas_cumprod=scheduler,
        prediction_type="epsilon",
        snr_gamma=5.0,
        weight_dtype=dtype,
        autocast=autocast,
    )
    return step.TrainingStep(compute, lambda loss: (loss * scale).backward(), flat, as_graph)


def make_batch(unet, size, side=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    config, (height, width) = unet.config, (side, side) if isinstance(side, int) else side
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    batch = {
        "latents": torch.randn(size, 4, height, width, generator=generator),
        "noise": torch.randn(size, 4, height, width, generator=generator),
        "timesteps": torch.randint(1000, (size,), generator=generator),
        "prompt_embeds": torch.randn(size, 77, config.cross_attention_dim, generator=generator).half(),
        "pooled_prompt_embeds": torch.randn(size, pooled, generator=generator).half(),
        "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]] * size),
    }
    return {name: tensor.to(DEVICE) for name, tensor in batch.items()}


def trajectory(folder, as_graph, shapes, count=0, release_at=None, quantize=False):
    """Train with plain gradient descent over batches of some shapes; return the losses and the weights."""
    unet, flat, fused_unet = load(folder, quantize=quantize)
    fused_unet.recompute(count)
    train_step = make_step(unet, flat, as_graph)
    losses = []
    for number, (size, side) in enumerate(shapes):
        if number == release_at:
            train_step.release()
        flat.grad.zero_()
        losses.append(train_step(make_batch(unet, size, side, seed=number)).clone())
        with torch.no_grad():
            flat -= 1e-3 * flat.grad
    return torch.cat(losses).cpu(), flat.detach().cpu()


# A number is the side of a square; of the buckets' shapes some halve to odd sizes.
SHAPES = [(2, 8), (2, 8), (1, 16), (2, 8), (1, 16), (3, 8)]
BUCKETS = [(2, side) for side in ((8, 12), (12, 8), (8, 12), (10, 6), (7, 9), (12, 8), (10, 6), (7, 9))]


@pytest.fixture(autouse=True)
def deterministic():
    """Attention's fast backward passes add in any order."""
    torch.use_deterministic_algorithms(True)  # with warnings alone attention would not heed it
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    "how",
    [{}, {"release_at": 3}, {"count": 5}, {"count": 1000}, {"quantize": True}],
    ids=["plain", "released between", "some recomputed", "all recomputed", "nf4"],
)
@pytest.mark.parametrize("shapes", [SHAPES, BUCKETS], ids=["squares", "buckets"])
def test_a_graph_gives_the_eager_bits(shapes, how, folder):
    eager = trajectory(folder, False, shapes, **how)
    graph = trajectory(folder, True, shapes, **how)
    assert torch.isfinite(eager[0]).all()
    assert torch.equal(eager[0], graph[0])
    assert torch.equal(eager[1], graph[1])


@pytest.mark.parametrize("side", [32, 64])
def test_attention_of_a_real_size_gives_the_same_bits_each_time(side):
    tensors = [torch.randn(2, 10, side**2, 64, device=DEVICE, dtype=torch.float16) for _ in range(4)]
    inputs = [tensor.requires_grad_() for tensor in tensors[:3]]
    gradients = []
    for _ in range(8):
        y = torch.nn.functional.scaled_dot_product_attention(*inputs)
        gradients.append(torch.autograd.grad(y, inputs, tensors[3]))
    assert all(torch.equal(a, b) for other in gradients[1:] for a, b in zip(gradients[0], other, strict=True))


LARGE = [(2, side) for side in ((64, 64), (48, 80), (80, 48), (56, 72), (72, 56))]


def reserved():
    memory.give_back()
    return torch.cuda.memory_reserved(DEVICE)


def test_graphs_of_several_shapes_share_their_memory(folder):
    unet, flat, _ = load(folder)
    train_step = make_step(unet, flat, True)
    train_step.run(make_batch(unet, 2))
    taken = [reserved()]
    for size, side in LARGE:
        train_step(make_batch(unet, size, side))
        taken.append(reserved())
    assert len(train_step.graphs) == len(LARGE)
    assert taken[-1] - taken[0] < 2 * (taken[1] - taken[0]), [number / 2**20 for number in taken]


@pytest.mark.parametrize("micro_batch_size", [None, 2], ids=["another shape", "another size of batch"])
def test_where_graphs_leave_no_memory_for_another_shape_the_steps_go_on_without(micro_batch_size, folder):
    unet, flat, _ = load(folder)
    eager, graph = make_step(unet, flat, False), make_step(unet, flat, True)
    graph.micro_batch_size = micro_batch_size
    small, large = make_batch(unet, 1, (80, 72), seed=1), make_batch(unet, 2, (80, 80), seed=2)
    gradients = []
    for train_step in (eager, graph):
        flat.grad.zero_()
        train_step(large)
        if train_step is graph:
            total = torch.cuda.get_device_properties(DEVICE).total_memory
            torch.cuda.set_per_process_memory_fraction((reserved() + 2**22) / total, DEVICE)
        try:
            train_step(small)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, DEVICE)
        gradients.append(flat.grad.clone())
    assert not graph.as_graph
    assert not graph.graphs
    assert torch.equal(*gradients)


def test_all_captures_are_on_one_stream():
    x, streams = {"x": torch.ones(8, device=DEVICE)}, set()

    def run(inputs):
        streams.add(torch.cuda.current_stream().cuda_stream)
        return inputs["x"] + 1

    for _ in range(3):
        assert torch.equal(graphs.capture(run, x)(x), x["x"] + 1)
    assert len(streams) == 1


def test_a_graph_adds_to_the_gradient_also_when_it_is_captured(folder):
    unet, flat, _ = load(folder)
    eager, graph = make_step(unet, flat, False), make_step(unet, flat, True)
    batches = [make_batch(unet, 2, seed=0), make_batch(unet, 1, seed=1), make_batch(unet, 2, seed=2)]
    gradients = []
    for train_step in (eager, graph):
        flat.grad.zero_()
        for batch in batches:
            train_step(batch)
        gradients.append(flat.grad.clone())
    assert torch.equal(*gradients)


@pytest.mark.parametrize("count", [0, 1000], ids=["kept", "recomputed"])
@pytest.mark.parametrize("as_graph", [False, True], ids=["eager", "graph"])
def test_the_gradient_is_whole_however_far_behind_the_side_stream_is(as_graph, count, folder, monkeypatch):
    def gradient():
        unet, flat, fused_unet = load(folder)
        fused_unet.recompute(count)
        make_step(unet, flat, as_graph)(make_batch(unet, 2))
        return flat.grad.clone()  # as the optimizer reads it: the host waits for nothing

    @contextlib.contextmanager
    def run_late(side):
        with running(side):
            torch.cuda._sleep(10**6)
            yield

    def mark_early(side):
        mark(side)
        torch.cuda._sleep(10**6)

    expected = gradient()
    running, mark = SideStream.running, SideStream.mark
    monkeypatch.setattr(SideStream, "running", run_late)
    monkeypatch.setattr(SideStream, "mark", mark_early)
    assert torch.equal(gradient(), expected)


def test_a_capture_that_fails_in_the_backward_pass_leaves_the_steps_to_go_on_without(folder, monkeypatch):
    def train():
        unet, flat, _ = load(folder)
        train_step = make_step(unet, flat, True)
        for number, side in enumerate((8, 16, 8)):
            train_step(make_batch(unet, 2, side, seed=number))
        return train_step.as_graph, flat.grad.clone()

    def add_or_fail(*inputs):
        if torch.cuda.is_current_stream_capturing():
            captured.append(1)
            if len(captured) == fail_at:
                raise torch.OutOfMemoryError("no room for a second graph")
        add(*inputs)

    add, captured, fail_at = kernels.add_lora_gradients, [], None
    monkeypatch.setattr(kernels, "add_lora_gradients", add_or_fail)
    as_graph, expected = train()
    assert as_graph
    fail_at = len(captured) * 3 // 4  # in the midst of the second graph's
    captured.clear()
    as_graph, found = train()
    assert not as_graph
    assert torch.equal(found, expected)


def test_every_step_reserves_what_the_first_one_did(folder):
    """A plan is what the first ones were measured to take; of this rank the LoRA is most of that."""
    unet, flat, _ = load(folder, rank=4096)
    train_step, batch = make_step(unet, flat, False), make_batch(unet, 1)
    peaks = [memory.measure_peak(lambda: train_step.run(batch), DEVICE) for _ in range(4)]
    of_lora = 2 * flat.numel()  # bytes in 16 bits
    assert max(peaks) - min(peaks) < of_lora / 4, [peak / memory.GIB for peak in peaks]


def plan_within(folder, budget_gib, samples=4, recompute=None):
    """Return what is planned for a step of so many large pictures."""
    unet, flat, fused_unet = load(folder)
    train_step = make_step(unet, flat, True)
    planner = memory_plan.Planner(
        lambda size: train_step.run(make_batch(unet, size, 128)),
        fused_unet.recompute,
        flat,
        torch.optim.AdamW([flat]),
        samples=samples,
        batch_size=samples,
        blocks=len(fused_unet.units()),
        recompute=recompute,
        budget_gib=budget_gib,
        sharing=1,
        update_bytes=0,
        can_quantize=True,
    )
    torch.cuda.set_per_process_memory_fraction(1.0, DEVICE)  # of the tests that follow
    return planner.plan()


def train_by(folder, plan):
    """Train four steps of four pictures by a plan; return the losses, and how far the weights went."""
    unet, flat, fused_unet = load(folder)
    fused_unet.recompute(plan.recomputed_blocks)
    train_step = make_step(unet, flat, True)
    train_step.samples, train_step.micro_batch_size = 4, plan.micro_batch_size
    start, losses = flat.detach().clone(), []
    for number in range(4):
        flat.grad.zero_()
        batch = make_batch(unet, 4, 128, seed=number)
        for parts in zip(*(tensor.split(plan.micro_batch_size) for tensor in batch.values()), strict=True):
            losses.append(train_step(dict(zip(batch, parts, strict=True))).clone())
        with torch.no_grad():
            flat -= 1e-3 * flat.grad
    return torch.cat(losses), flat.detach() - start


def test_a_step_that_a_budget_splits_or_recomputes_trains_what_the_whole_one_does(folder):
    whole, one = plan_within(folder, None), plan_within(folder, None, samples=1)
    least = plan_within(folder, None, samples=1, recompute=True)
    assert whole[:2] == (4, 0)
    assert least.predicted_bytes < one.predicted_bytes < whole.predicted_bytes
    split = plan_within(folder, (whole.predicted_bytes + one.predicted_bytes) / 2 / memory.GIB)
    recomputed = plan_within(folder, (one.predicted_bytes + least.predicted_bytes) / 2 / memory.GIB)
    assert split.micro_batch_size < 4
    assert split.recomputed_blocks == 0
    assert recomputed.micro_batch_size == 1
    assert recomputed.recomputed_blocks > 0
    # Products of other sizes round otherwise; what is computed again does not.
    for plan, like, rtol in ((split, whole, 0.02), (one, whole, 0.02), (recomputed, one, 1e-4)):
        losses, change = train_by(folder, plan)
        like_losses, like_change = train_by(folder, like)
        torch.testing.assert_close(losses, like_losses, rtol=rtol / 10, atol=0)
        assert (change - like_change).norm() < rtol * like_change.norm()


def test_fp16_is_near_pefts_forward_under_autocast(folder):
    unet, flat, _ = load(folder)
    batch = make_batch(unet, 2)
    make_step(unet, flat, False)(batch)
    found = flat.grad.clone()
    for module in unet.modules():
        module.__dict__.pop("forward", None)
    fused.upsample_deterministically(unet)
    flat.grad.zero_()
    train_step = make_step(unet, flat, False)
    train_step.compute = functools.partial(train_step.compute, autocast=True)
    train_step(batch)
    assert (found - flat.grad).norm() < 0.02 * flat.grad.norm()


@pytest.mark.parametrize("use_8bit_adam", [True, False])
def test_the_optimizers_train_the_flat_parameter_between_replays(use_8bit_adam, folder):
    unet, flat, _ = load(folder)
    optimizer = optim.make_optimizer(flat, "adamw", use_8bit_adam, 1e-3, (0.9, 0.999), 0.01, 1e-8)
    train_step, batch = make_step(unet, flat, True, scale=1.0), make_batch(unet, 2)
    losses = []
    for _ in range(30):
        flat.grad.zero_()
        losses.append(train_step(batch).mean().item())
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]


def least_overflow(unet, flat, batch, autocast, in_16_bits):
    """Return the exponent of 2 from which on a loss scale lets the LoRA's gradient overflow."""

    def overflows(exponent):
        flat.grad.zero_()
        make_step(unet, flat, False, 2.0**exponent, autocast=autocast)(batch)
        return not (flat.grad.half() if in_16_bits else flat.grad).isfinite().all().item()

    return bisect.bisect_left(range(32), True, key=overflows)


def test_gradients_overflow_where_pefts_do_but_for_what_autocast_sums_in_16_bits(folder):
    unet, flat, _ = load(folder)
    found = []
    for seed in range(6):
        batch = make_batch(unet, 2, side=32, seed=seed)
        as_fused = [least_overflow(unet.train(), flat, batch, False, in_16_bits) for in_16_bits in (False, True)]
        found.append((least_overflow(unet.eval(), flat, batch, True, False), *as_fused))  # in evaluation it is PEFT's
    assert all(fused >= autocast for autocast, fused, _ in found), found
    # One of them may lie so near to the largest number that the order of rounding decides.
    assert sum(rounded == autocast for autocast, _, rounded in found) >= 5, found
    assert any(fused > autocast for autocast, fused, _ in found), found

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from align import workload
from align.policy import MAX_TOKENS, Lora
from scripts import measure_step
from scripts.measure_step import SIZES, MeasureConfig

SMALL = {"size": "tiny", "num_frames": 9, "height": 64, "width": 64, "dtype": "float32", "mixed_precision": "no"}


def bench_of(**changes: Any) -> measure_step.Bench:
    return measure_step.make_bench(MeasureConfig.model_validate(SMALL | changes))


def work_of(bench: measure_step.Bench, lora: Lora, num_text_tokens: int = MAX_TOKENS) -> workload.Workload:
    transformer = workload.transformer_of(bench.policy.pipeline.transformer.config)
    c, f, h, w = bench.batch[0].noise.shape
    return workload.workload(transformer, (c, f, h, w), num_text_tokens, lora)


def flop_of(work: Callable[[], None]) -> int:
    """What torch counts, of two videos; attention as plain products, which it knows on a CPU."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("lora", [Lora(rank=4), Lora(rank=3, feed_forward=True)])
def test_flop_and_parameters_are_those_that_torch_counts(lora: Lora):
    bench = bench_of(lora=lora)
    work, transformer = work_of(bench, lora), bench.policy.pipeline.transformer
    assert work.num_trained == sum(p.numel() for p in bench.policy.lora_parameters())
    assert work.num_parameters == sum(p.numel() for p in transformer.parameters()) - work.num_trained
    assert work.forward_flop == flop_of(bench.forward)
    with bench.policy.as_reference():
        assert work.reference_flop == flop_of(bench.forward)
    transformer.disable_gradient_checkpointing()
    assert work.step_flop == flop_of(bench.step)
    transformer.enable_gradient_checkpointing()
    assert work.step_flop + work.recomputed_flop == flop_of(bench.step)


def test_wan_at_480p():
    """81 frames of 480 x 832 are 21 x 30 x 52 = 32,760 tokens, the model 1.42 billion parameters.

    A block has 8 projections of 1536 channels in attention; at rank 32, 30 blocks have 30 x 8 x 32 x 3072 = 23,592,960
    parameters to train. Attention alone takes 4 x 1536 x 32,760 x (32,760 + 512) x 30 FLOP, 2.009e14.
    """
    transformer = workload.transformer_of(SIZES["wan2.1-1.3b"])
    work = workload.workload(transformer, (16, 21, 60, 104), MAX_TOKENS, Lora())
    assert (work.num_tokens, work.num_parameters, work.num_trained) == (32_760, 1_418_996_800, 23_592_960)
    assert work.reference_flop == pytest.approx(2.009e14 + 2 * 32_760 * 1.3e9, rel=0.02)


# Memory -----------------------------------------------------------------------------------------------------


def peak_of(work: Callable[[], None]) -> int:
    """Give the most bytes allocated at a time, over those from before."""
    with warnings.catch_warnings(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        warnings.simplefilter("ignore")
        work()
    assert found.profiler is not None
    assert found.profiler.kineto_results is not None
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    total = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        most = max(most, total)
    return most


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("number_bytes", [2, 4])
def test_the_rule_for_activations_holds_on_a_cpu(
    number_bytes: int, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(SIZES, "tiny", SIZES["tiny"] | {"ffn_dim": 140, "num_layers": 6})
    lora = Lora(rank=2)
    bench = bench_of(lora=lora, height=128, width=160, dtype="bfloat16" if number_bytes == 2 else "float32")
    bench = replace(bench, prompt_embeds=bench.prompt_embeds[:4])
    if checkpointing:
        bench.policy.pipeline.transformer.enable_gradient_checkpointing()
    with torch.autocast("cpu", torch.bfloat16) if number_bytes == 2 else nullcontext():
        bench.step()  # makes the optimiser's moments, which are not of a step
        peak = peak_of(bench.step)
        forward = peak_of(bench.forward)
    work = work_of(bench, lora, num_text_tokens=4)
    expected = work.activation_bytes(2, number_bytes=number_bytes, checkpointing=checkpointing)
    assert expected == pytest.approx(peak, rel=0.2)
    assert work.forward_bytes(2, number_bytes=number_bytes) == pytest.approx(forward, rel=0.2)

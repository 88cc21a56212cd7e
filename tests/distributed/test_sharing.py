"""Two processes share a model (expert and tensor parallelism): as in one process, but for rounding.

Where processes add up parts of a sum, they do it in another order than one process, so that logits
and losses agree to some last bits, and weights after AdamW to what that makes of those bits.
"""

from __future__ import annotations

import pytest

from tests.distributed.launcher import Launch, run_scenarios, told
from tests.models import tiny

pytest.importorskip("transformers.distributed.expert_parallel", reason="transformers >= 5.21")

BY_EXPERT = (
    "qwen_by_expert",
    "glm_with_shared_experts_and_router",
    "gpt_oss",
    "experts_of_one_process_only",
    "experts_without_tokens",
    "clipped_with_all_that_trains",
)
ALL = (*BY_EXPERT, "qwen_by_slice", "glm_by_slice")


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    folder = tmp_path_factory.mktemp("sharing")
    for family in ("qwen3_moe", "glm4_moe", "gpt_oss"):
        tiny(family).save_pretrained(folder / family)
    found = run_scenarios("tests.distributed.sharing_scenarios", folder)
    assert [end.code for end in found.ended] == [0, 0], told(found.ended)
    return found


@pytest.mark.parametrize("scenario", ALL)
def test_scores_are_those_of_one_process(launch: Launch, scenario: str) -> None:
    alone, shared = launch.results(scenario)[0]["scores"]
    for layer, scores in alone["layers"].items():
        assert shared["layers"][layer]["token"] == scores["token"]
        assert shared["layers"][layer]["gate"] == pytest.approx(scores["gate"], abs=1e-6)


@pytest.mark.parametrize("scenario", ALL)
def test_losses_are_those_of_one_process(launch: Launch, scenario: str) -> None:
    first, second = launch.results(scenario)
    alone, shared = first["losses"]
    assert first["logits"] < 1e-5
    assert shared == pytest.approx(alone, abs=1e-5)
    assert shared == second["losses_here"]
    if scenario != "experts_without_tokens":  # the first batch again; something was learnt
        assert alone[0] != pytest.approx(alone[-1], abs=1e-3)


@pytest.mark.parametrize("scenario", ALL)
def test_a_delta_is_written_once_with_all_that_trained(launch: Launch, scenario: str) -> None:
    found = launch.results(scenario)[0]
    assert found["starts"][0] == found["starts"][1]  # before training, bit for bit
    assert found["names"][0] == found["names"][1]
    assert found["weights"] < 1e-5
    assert found["files"] == ["esft_base.json", "esft_config.json", "esft_delta.safetensors"]


@pytest.mark.parametrize("scenario", ALL)
def test_the_merge_is_the_trained_model(launch: Launch, scenario: str) -> None:
    assert launch.results(scenario)[0]["merged"]


def test_each_process_trains_the_selected_experts_that_it_holds(launch: Launch) -> None:
    first, second = (found["held"] for found in launch.results("experts_of_one_process_only"))
    assert first == [[0, 0], [2, 2], [2, 2]]
    assert second == [[0, 0], [0, 0], [0, 0]]
    first, second = (found["held"] for found in launch.results("qwen_by_expert"))
    assert first == [[2, 2], [1, 1], [0, 0]]
    assert second == [[0, 0], [1, 1], [2, 2]]


def test_gradients_are_clipped_by_their_norm_over_all_processes(launch: Launch) -> None:
    first, second = launch.results("clipped_with_all_that_trains")
    alone, shared = first["norms"]
    assert min(alone) > 0.05  # every step is clipped
    assert shared == pytest.approx(alone, rel=1e-5)
    assert shared == second["norms_here"]


def test_what_trains_in_fp32_may_be_sliced_and_compute_in_bf16(launch: Launch) -> None:
    found = launch.results("half_precision")[0]
    assert found["starts"][0] == found["starts"][1]
    assert found["merged"]
    alone, shared = found["losses"]
    assert shared == pytest.approx(alone, rel=0.02)  # bf16 rounds to 1 part in 256


def test_a_model_is_saved_whole_while_a_selection_is_attached(launch: Launch) -> None:
    assert launch.results("attached_and_saved_whole")[0]


def test_what_cannot_be_shared_is_refused(launch: Launch) -> None:
    fsdp, with_experts, trainer, low_rank = launch.results("refused")[0]
    for said in (fsdp, with_experts):
        assert "sharded by FSDP" in said
        assert "DistributedConfig(tp_size=N, ep_size=N)" in said
    assert "esft.gradients.clip_gradients" in trainer
    assert "low-rank" in low_rank

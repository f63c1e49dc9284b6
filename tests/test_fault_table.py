"""The short form of the fault table: every training script killed in every phase of a run, and faults of each other kind."""

import pytest
from fault_table import (
    PHASES,
    SCRIPTS,
    Place,
    Row,
    bad_data,
    bad_gradients,
    clock_back,
    sweep,
)

pytestmark = pytest.mark.xdist_group("two")
DDP, FSDP = (("--devices", 2, "--strategy", name) for name in ("ddp", "fsdp"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("faults"))


def check(row: Row, runs: int, again: int = 2) -> None:
    assert not row.lost, "\n".join(row.lost)
    assert row.runs == runs and row.again <= again


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_kill_in_any_phase_loses_nothing(place: Place, script: str) -> None:
    """Requirement 22, with dropout, shuffling, packing and accumulation, over more than an epoch."""
    some = PHASES[2 + SCRIPTS.index(script) % 3 :][:1]  # step, evaluation or save
    for phase in PHASES if script == "finetune_lora" else some:
        check(sweep(place, "kill", script, phase, 1), 1)


@pytest.mark.parametrize(
    ("script", "more", "rank", "phase"),
    [
        ("finetune_lora", DDP, 1, "step"),
        ("finetune_qlora", FSDP, 0, "save"),
        ("finetune_full", FSDP, 1, "final export"),
        ("pretrain", DDP, 0, "step"),
    ],
)
def test_the_death_of_one_of_two_ends_both_and_loses_nothing(
    place: Place, script: str, more: tuple[object, ...], rank: int, phase: str
) -> None:
    check(sweep(place, "kill", script, phase, 1, more, rank), 1)


def test_a_signal_to_any_process_stops_all_after_the_same_step(place: Place) -> None:
    check(sweep(place, "SIGTERM", "finetune_lora", "step", 1, DDP, rank=1), 1, again=0)
    check(sweep(place, "Ctrl-C", "finetune_lora", "step", 1), 1, again=0)


@pytest.mark.parametrize("phase", ["save", "final export"])
def test_a_full_disk_is_named_and_loses_nothing(place: Place, phase: str) -> None:
    check(sweep(place, "full disk", "finetune_lora", phase, 1), 1)


def test_data_that_changes_while_it_is_trained_on_changes_nothing(place: Place) -> None:
    check(sweep(place, "new data", "finetune_lora", "step", 1), 1)


def test_clocks_do_not_matter(place: Place) -> None:
    check(clock_back(place, "finetune_lora"), 1)


@pytest.mark.parametrize("more", [(), DDP, FSDP], ids=str)
def test_a_bad_example_is_named_by_file_and_line_whoever_has_it(place: Place, more: tuple[object, ...]) -> None:
    check(bad_data(place, "finetune_lora", more), 1)


@pytest.mark.parametrize(("script", "more"), [("pretrain", ()), ("finetune_lora", FSDP)])
def test_bad_gradients_stop_the_run_before_the_step(place: Place, script: str, more: tuple[object, ...]) -> None:
    check(bad_gradients(place, script, more, steps=[4]), 1, again=1)

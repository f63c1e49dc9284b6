"""The short form of the fault table: every training script killed in every phase of a run, and faults of each other kind."""

import pytest
from fault_table import (
    PHASES,
    SAVE_EVERY,
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


def check(row: Row, runs: int, again: int = 2 * SAVE_EVERY) -> None:
    """Of the two latest checkpoints, the last may not be on the disk yet: the next save waits for it."""
    assert not row.lost, "\n".join(row.lost)
    assert row.runs == runs and row.again <= again


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_kill_in_any_phase_loses_nothing(place: Place, script: str) -> None:
    """Requirement 22, with dropout, shuffling, packing and accumulation, over two epochs."""
    some = PHASES[2 + SCRIPTS.index(script) % 3 :][:1]  # step, evaluation or save
    for phase in PHASES[2:] if script == "finetune_lora" else some:
        check(sweep(place, "kill", script, phase, 1), 1)


@pytest.mark.parametrize(
    ("script", "more", "rank", "phase"), [("finetune_lora", DDP, 1, "step"), ("finetune_qlora", FSDP, 0, "save")]
)
def test_the_death_of_one_of_two_ends_both_and_loses_nothing(
    place: Place, script: str, more: tuple[object, ...], rank: int, phase: str
) -> None:
    check(sweep(place, "kill", script, phase, 1, more, rank), 1)


def test_a_signal_to_any_process_stops_all_after_the_same_step(place: Place) -> None:
    check(sweep(place, "SIGTERM", "finetune_lora", "step", 1, DDP, rank=1), 1, again=0)


def test_a_full_disk_is_named_and_loses_nothing(place: Place) -> None:
    check(sweep(place, "full disk", "finetune_lora", "final export", 1), 1)


def test_data_that_changes_while_it_is_trained_on_changes_nothing(place: Place) -> None:
    check(sweep(place, "new data", "finetune_lora", "step", 1), 1)


def test_clocks_do_not_matter(place: Place) -> None:
    check(clock_back(place, "finetune_lora"), 1)


def test_a_bad_example_is_named_by_file_and_line_whichever_process_has_it(place: Place) -> None:
    check(bad_data(place, "finetune_lora", DDP), 1)


def test_bad_gradients_stop_the_run_before_the_step(place: Place) -> None:
    """Of a corpus, too, whose rows have no documents to tell apart."""
    check(bad_gradients(place, "pretrain", steps=[4]), 1, again=1)

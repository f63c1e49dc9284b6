"""A run writes where nothing of others is, and never over a run that another process has written meanwhile."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from lightning_fabric import Fabric

from litmini import system
from litmini.config.finetune import DataConfig, FinetuneLoraConfig
from litmini.errors import UserError
from litmini.files import write_json
from litmini.runs.directory import RunDirectory, plain
from litmini.runs.report import plot_metrics
from litmini.runs.run import Run
from litmini.training.setup import Progress

NAMES = ["config.yaml", "manifest.json", "metrics.csv", "samples.jsonl", "loss.png", "report.html"]
NAMES += ["final", "step-000002", "bad-step-000001.json", "tensorboard", "wandb_id"]


def settings(place: Path, resume: bool | str = False, **more: object) -> FinetuneLoraConfig:
    (place / "data.jsonl").touch()
    data = DataConfig(path=str(place / "data.jsonl"))
    return FinetuneLoraConfig(checkpoint_dir="base", out_dir=str(place / "run"), data=data, resume=resume, **more)


def begin(directory: RunDirectory, monkeypatch) -> Run:
    monkeypatch.setattr("litmini.runs.run.describe_run", lambda *_: {})  # there is no base model
    fabric, model = Fabric(accelerator="cpu", devices=1), torch.nn.Linear(2, 2)
    tokenizer, optimizer = SimpleNamespace(chat_template=None, save=lambda d: None), torch.optim.SGD(model.parameters())
    run = Run(directory, fabric, model, optimizer, tokenizer, lambda d: (d / "a").touch(), {}, {})  # type: ignore[arg-type]
    write_json(run.directory / "manifest.json", {})
    return run


def make(path: Path) -> None:
    if path.suffix:
        path.write_text("mine: 1")
    else:
        path.mkdir()
        (path / "mine").write_text("mine: 1")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("resume", [False, "auto"])
def test_things_of_others_are_not_overwritten(tmp_path, name, resume):
    (tmp_path / "run").mkdir()
    make(tmp_path / "run" / name)
    with pytest.raises(UserError, match=rf"{name}|already holds a run|is finished"):
        RunDirectory(settings(tmp_path, resume))
    assert RunDirectory(settings(tmp_path, dry_run=True)).restart_from is None  # writes nothing
    assert RunDirectory(settings(tmp_path)) if name == "other" else True


def test_other_names_do_not_matter_and_stay(tmp_path, monkeypatch):
    """A log that the shell writes there, say."""
    (tmp_path / "run").mkdir()
    for name in ("log.txt", ".film.partial", ".x.old", "notes"):
        make(tmp_path / "run" / name)
    begin(RunDirectory(settings(tmp_path)), monkeypatch)
    system.unlock_all()
    assert all((tmp_path / "run" / name).exists() for name in ("log.txt", ".film.partial", ".x.old", "notes"))


def test_a_file_in_the_place_of_the_directory(tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(UserError, match="is a file"):
        RunDirectory(settings(tmp_path))


@pytest.mark.parametrize("name", ["final", "step-000002", "step-000009"])
def test_a_run_that_resumes_replaces_no_directory_of_others(tmp_path, monkeypatch, name):
    run = begin(RunDirectory(settings(tmp_path)), monkeypatch)
    run.checkpoint(Progress(step=1))
    run.wait()
    system.unlock_all()
    assert RunDirectory(settings(tmp_path, "auto")).restart_from == run.directory / "step-000001"
    make(run.directory / name)
    with pytest.raises(UserError, match=f"holds {name}, which a run would overwrite"):
        RunDirectory(settings(tmp_path, "auto"))


def test_the_later_of_two_runs_ends_with_an_error(tmp_path, monkeypatch):
    """Both found nothing when they began; the first has finished before the other begins to write."""
    first, second = RunDirectory(settings(tmp_path)), RunDirectory(settings(tmp_path))
    begin(first, monkeypatch).save_final()
    with pytest.raises(UserError, match="already holds a run"):
        begin(second, monkeypatch)
    system.unlock_all()
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    with pytest.raises(UserError, match="already holds a run"):
        begin(second, monkeypatch)
    system.unlock_all()
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before


def test_the_later_of_two_that_resume_ends_with_an_error(tmp_path, monkeypatch):
    begin(RunDirectory(settings(tmp_path)), monkeypatch)
    system.unlock_all()
    first, second = RunDirectory(settings(tmp_path, "auto")), RunDirectory(settings(tmp_path, "auto"))
    run = begin(first, monkeypatch)
    run.checkpoint(Progress(step=1))
    run.wait()
    system.unlock_all()
    with pytest.raises(UserError, match="another process has saved .*step-000001 in .* meanwhile"):
        begin(second, monkeypatch)
    system.unlock_all()
    run.save_final()
    (run.directory / "report.html").touch()
    third = RunDirectory.__new__(RunDirectory)
    third.__dict__ |= {**second.__dict__, "restart_from": run.directory / "step-000001"}
    with pytest.raises(UserError, match="is finished"):
        third.check_again()


def write_run(place: Path, **changes: object) -> None:
    """A run with one checkpoint; its config.yaml has `changes`, and lacks what is None there."""
    step = place / "run/step-000002"
    step.mkdir(parents=True)
    write_json(step / "training_state.json", {})
    write_json(place / "run/manifest.json", {})
    saved = plain(settings(place)) | changes
    (place / "run/config.yaml").write_text(yaml.safe_dump({k: v for k, v in saved.items() if v != "missing"}))


def test_a_run_of_an_earlier_version_resumes(tmp_path):
    """It lacks settings of today, and had another default of `compile`."""
    write_run(tmp_path, attention="missing", float32_matmul_precision="missing", compile=False)
    directory = RunDirectory(settings(tmp_path, "auto"))
    assert directory.restart_from and directory.config.compile is False
    with pytest.raises(UserError, match="attention: auto -> flex"):
        RunDirectory(settings(tmp_path, "auto", attention="flex"))
    with pytest.raises(UserError, match="compile: False -> True"):
        RunDirectory(settings(tmp_path, "auto", compile=True))


def test_a_setting_that_is_no_more_is_refused(tmp_path):
    write_run(tmp_path, gone=3)
    with pytest.raises(UserError, match="gone: 3 -> None"):
        RunDirectory(settings(tmp_path, "auto"))


def test_a_picture_is_not_drawn_through_a_link(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,loss,val_loss\n1,2.0,\n2,1.0,1.5\n")
    (tmp_path / "another").write_text("mine")
    (tmp_path / "loss.png").symlink_to("another")
    plot_metrics(tmp_path, {})
    assert (tmp_path / "another").read_text() == "mine" and (tmp_path / "loss.png").stat().st_size > 1000

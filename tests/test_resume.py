"""Nothing is lost: kills, interrupts, finished runs, changed settings."""

import json
import random
import time
from pathlib import Path
from signal import SIGINT

import numpy as np
import pytest
import torch
from kernels import epochs_done, run_notebook, same, small_run, state_of
from nbclient.exceptions import CellExecutionError, DeadKernelError

import nbtools

# ---- in one process


@pytest.mark.parametrize(
    ("precision", "workers"), [("fp32", 0), ("fp32", 2), ("bf16", 0), ("fp16", 0)]
)
def test_a_run_in_two_halves_is_the_same_as_one(start, settings, tmp_path, precision, workers):
    start(epochs=4, save_dir=str(tmp_path / "one"), precision=precision)[1]()
    start(epochs=2, save_dir=str(tmp_path / "two"), precision=precision, num_workers=workers)[1]()
    history = start(epochs=4, save_dir=str(tmp_path / "two"), precision=precision)[1]()
    assert len(history) == 4
    assert same(state_of(tmp_path / "one"), state_of(tmp_path / "two"))


def test_a_run_from_before_weights_were_averaged_goes_on_from_what_it_had(nb, start, settings):
    start()[1]()
    path = Path(settings["save_dir"]) / "rooftop_last.pt"
    old = torch.load(path, weights_only=True)
    old["model"] = old.pop("learner")
    torch.save(old, path)
    run, go = start(epochs=3)
    assert nb.resume_run(run)
    for part in (run.model, run.ema):
        assert same(dict(part.state_dict()), dict(old["model"]))
    assert len(go()) == 3


def test_a_changed_setting_starts_a_new_run_and_is_named(start, settings, capsys):
    start()[1]()
    old = (Path(settings["save_dir"]) / "rooftop_best_model_iou.pt").read_bytes()
    (Path(settings["save_dir"]) / "rooftop.onnx").write_bytes(b"of the old model")
    run, go = start(learning_rate=2e-3)
    go()
    assert "learning_rate: 0.001 is now 0.002" in capsys.readouterr().out
    (kept,) = (Path(settings["save_dir"]) / "archive").glob("*/rooftop_best_model_iou.pt")
    assert kept.read_bytes() == old
    assert kept.with_name("rooftop.onnx").exists()
    assert not (Path(settings["save_dir"]) / "rooftop.onnx").exists()


@pytest.mark.parametrize(
    "change", [{"threshold": 0.4}, {"tta": False}, {"num_workers": 1}, {"resume": True}]
)
def test_settings_that_do_not_matter_to_training_never_retrain(start, capsys, change):
    start()[1]()
    capsys.readouterr()
    assert len(start(**change)[1]()) == 2
    text = capsys.readouterr().out
    assert "going on after epoch 2" in text and "train loss" not in text


def test_resume_false_starts_anew(start, settings):
    start()[1]()
    assert len(start(resume=False)[1]()) == 2
    assert len(list((Path(settings["save_dir"]) / "archive").iterdir())) == 1


def test_other_data_starts_a_new_run(start, write_pair, capsys):
    start()[1]()
    write_pair("s99_1")
    start()[1]()
    assert "other split" in capsys.readouterr().out


def test_a_resumed_run_keeps_its_precision(nb, start):
    """Where the device has it; fp16 of a GPU is none for a CPU (test_meaning.py)."""
    own = nb.choose_precision("auto", torch.device("cpu"))
    other = "bf16" if own == "fp32" else "fp32"
    first, go = start(epochs=1, precision="auto")
    first.precision = other
    go()
    run, go = start(epochs=2, precision="auto")
    assert run.precision == own
    go()
    assert run.precision == other and len(run.history) == 2


@pytest.mark.parametrize(
    "spoil", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"foreign" * 99]
)
def test_a_last_checkpoint_that_cannot_be_read_is_kept_and_named(start, settings, spoil):
    start()[1]()
    path = Path(settings["save_dir"]) / "rooftop_last.pt"
    path.write_bytes(spoil(path.read_bytes()))
    told = r"cannot go on; move .*rooftop_last.pt away, or set resume = False: .*was not loaded"
    with pytest.raises(ValueError, match=told):
        start()[1]()
    assert path.exists() and not (Path(settings["save_dir"]) / "archive").exists()


@pytest.mark.parametrize("at", [0, 3, 5])
def test_an_interrupt_falls_back_to_the_last_finished_epoch(
    nb, start, settings, tmp_path, monkeypatch, at, capsys
):
    start(epochs=3, save_dir=str(tmp_path / "whole"))[1]()
    run, go = start(epochs=3, save_dir=str(tmp_path / "cut"))
    calls, forward = [], nb.forward_pass

    def interrupting(*words):
        calls.append(1)
        if len(calls) == at + 1:
            raise KeyboardInterrupt
        return forward(*words)

    monkeypatch.setattr(nb, "forward_pass", interrupting)
    history = go()
    assert (
        len(history) == at // 2 and f"{at // 2} finished epochs are kept" in capsys.readouterr().out
    )
    assert len(go()) == 3  # the same cell once more
    assert same(state_of(tmp_path / "whole"), state_of(tmp_path / "cut"))


@pytest.mark.parametrize("at", [1, 2, 3, 5, 6])
def test_a_run_cut_off_between_any_two_files_is_the_same(nb, start, tmp_path, monkeypatch, at):
    start(epochs=3, save_dir=str(tmp_path / "whole"))[1]()
    _, go = start(epochs=3, save_dir=str(tmp_path / "cut"))
    write, calls = nb.write_atomically, []

    def cut_off(*words):
        calls.append(1)
        if len(calls) > at:
            raise SystemExit
        write(*words)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(nb, "write_atomically", cut_off)
        go()
    start(epochs=3, save_dir=str(tmp_path / "cut"))[1]()
    assert same(state_of(tmp_path / "whole"), state_of(tmp_path / "cut"))


def test_writing_takes_a_small_share_of_the_time_and_loses_nothing(
    nb, start, tmp_path, monkeypatch
):
    """Slow disks: the files of several short epochs go together; what ends a run writes the rest."""
    start(epochs=4, save_dir=str(tmp_path / "whole"))[1]()
    run, go = start(epochs=4, save_dir=str(tmp_path / "slow"))
    written, write, one_pass = [], nb.write_atomically, nb.one_pass
    monkeypatch.setattr(nb, "WRITE_SHARE", 0.05)

    def slowly(path, content):
        written.append((len(run.history), path.name))
        run.seconds_writing += 1000
        write(path, content)

    def failing(run, loader, loss_fn):
        if len(run.history) == 3:
            raise RuntimeError("the cable")
        return one_pass(run, loader, loss_fn)

    monkeypatch.setattr(nb, "write_atomically", slowly)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="the cable"):
        patch.setattr(nb, "one_pass", failing)
        go()
    lasts = [epoch for epoch, name in written if name == nb.LAST_FILE]
    assert lasts == [1, 3] and epochs_done(tmp_path / "slow") == 3
    run, go = start(epochs=4, save_dir=str(tmp_path / "slow"))
    assert len(go()) == 4 and epochs_done(tmp_path / "slow") == 4
    assert same(state_of(tmp_path / "whole"), state_of(tmp_path / "slow"))


@pytest.mark.parametrize("ending", [KeyboardInterrupt, RuntimeError])
def test_what_waits_is_written_before_anything_else_can_fail(nb, start, monkeypatch, ending):
    """As after an error of the GPU, where nothing can be restored any more."""
    run, go = start(epochs=4)
    monkeypatch.setattr(nb, "WRITE_SHARE", -1)  # never in time
    restore, one_pass = nb.restore_run, nb.one_pass

    def failing(run, loader, loss_fn):
        if len(run.history) == 2:
            raise ending
        return one_pass(run, loader, loss_fn)

    def broken(run, last):
        if run.history:
            raise RuntimeError("device-side assert")
        restore(run, last)

    monkeypatch.setattr(nb, "one_pass", failing)
    monkeypatch.setattr(nb, "restore_run", broken)
    with pytest.raises(RuntimeError, match="device-side assert"):
        go()
    assert epochs_done(Path(run.config.save_dir)) == 2


@pytest.mark.parametrize(("epochs", "partly"), [(1, False), (2, False), (2, True)])
def test_a_stop_button_pressed_twice_loses_nothing(
    nb, start, tmp_path, monkeypatch, epochs, partly
):
    start(epochs=3, save_dir=str(tmp_path / "whole"))[1]()
    _, go = start(epochs=3, save_dir=str(tmp_path / "cut"))
    judged, one_pass, restore = [], nb.one_pass, nb.restore_run

    def first(run, loader, loss_fn):
        if not loader.dataset.train:
            judged.append(1)
            if len(judged) == epochs:
                raise KeyboardInterrupt
        return one_pass(run, loader, loss_fn)

    def second(*words):
        if judged and not partly:
            raise KeyboardInterrupt
        restore(*words)
        if judged:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(nb, "one_pass", first)
        patch.setattr(nb, "restore_run", second)
        go()
    assert len(go()) == 3
    assert same(state_of(tmp_path / "whole"), state_of(tmp_path / "cut"))


def test_a_last_checkpoint_that_fails_half_way_leaves_no_trace(nb, start, settings, tmp_path):
    start(epochs=2, save_dir=str(tmp_path / "whole"))[1]()
    start(epochs=2)[1]()
    path = Path(settings["save_dir"]) / nb.LAST_FILE
    for part in ("optimizer", "model"):
        torch.save(
            torch.load(tmp_path / "whole" / nb.LAST_FILE, weights_only=True)
            | {part: {"nonsense": 1}},
            path,
        )
        saved = torch.load(path, weights_only=True)
        torch.save(saved | {"config": saved["config"] | {"save_dir": settings["save_dir"]}}, path)
        run, go = start(epochs=2)
        with pytest.raises(ValueError, match="cannot go on"):
            go()
        path.unlink()
        go()
        assert same(state_of(tmp_path / "whole"), state_of(Path(settings["save_dir"])))


# ---- in a real kernel


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Settings of a run of a few seconds, on tiles that are there."""
    return small_run(tmp_path_factory.mktemp("tiles"), epochs=10)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, small):
    """What is left of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run_notebook(folder, small | {"save_dir": "out"})
    return state_of(folder / "out")


CHECK = "config = make_config(**{f.name: globals()[f.name] for f in fields(Config)})\n"
CHECK += "session = replace(session, config=config)"
MODEL = "run = Run(session.config, session.device, session.precision, run.data)"
SPLIT = 'tile_split = replace(tile_split, parts={"train": []})'


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (f"learning_rate = 0.5\n{CHECK}", "learning_rate changed since section 7"),
        (f'class_names = ["a", "b"]\n{CHECK}\n{MODEL}', "class_names changed since section 2"),
        (f"split = [0.4, 0.3, 0.3]\n{CHECK}\n{MODEL}", "split changed since section 5"),
        (SPLIT, "the split changed since section 7"),
    ],
)
def test_changed_settings_whose_cells_were_not_run_are_noticed(tmp_path, small, change, told):
    """A person who edits the settings, runs that cell, the check, and then only later ones."""
    with pytest.raises(CellExecutionError, match=told):
        run_notebook(tmp_path, small | {"save_dir": "out"}, before_training=change)
    assert not list((tmp_path / "out").glob("*.pt"))


def test_training_uses_the_settings_that_its_checkpoint_records(nb, start, monkeypatch):
    """Other augmentation or batches need no new look at the data, only a new run."""
    run, go = start(epochs=1)
    run.config = nb.replace(run.config, augmentation="none", batch_size=3)
    seen, one_pass = [], nb.one_pass

    def watched(run, loader, *words):
        seen.append((loader.batch_size, len(loader.dataset.augment.transforms)))
        return one_pass(run, loader, *words)

    monkeypatch.setattr(nb, "one_pass", watched)
    go()
    saved = torch.load(Path(run.config.save_dir) / nb.LAST_FILE, weights_only=True)["config"]
    assert seen == [(3, 0), (3, 0)] and (saved["batch_size"], saved["augmentation"]) == (3, "none")


def test_kills_at_any_moment_lose_nothing(tmp_path, small, undisturbed):
    out, rng = tmp_path / "out", random.Random(0)

    def writing():
        return any(out.glob("rooftop_*.part"))

    def after_another_epoch():
        return epochs_done(out) > before and not time.sleep(rng.uniform(0, 0.5))

    for when in (writing, after_another_epoch, after_another_epoch):
        before = epochs_done(out)
        with pytest.raises(DeadKernelError):
            run_notebook(tmp_path, small | {"save_dir": "out"}, when)
    text = nbtools.printed(run_notebook(tmp_path, small | {"save_dir": "out"}))
    assert "going on after epoch" in text
    assert same(undisturbed, state_of(out))
    assert len(list(out.glob("archive/*"))) <= 1  # of a first epoch that was cut off


KEPT = "finished epochs are kept; run this cell again to go on"


def test_the_stop_button_in_the_first_epoch_ends_without_an_error(nb, start, monkeypatch, capsys):
    run, go = start(epochs=3)

    def stopped(*words):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(nb, "forward_pass", stopped)
        assert go() == []
    assert "stopped: 0 finished epochs are kept" in capsys.readouterr().out
    assert len(go()) == 3


def test_runs_are_compared_by_what_changed(nb, start, settings):
    for rate in (1e-3, 2e-3):
        run, go = start(epochs=1, learning_rate=rate)
        go()
        score = {"roof_iou": rate * 100, "intervals": {"roof_iou": [0.0, 1.0]}}
        name = nb.LAST_FILE  # of a saved model it is a whole path
        if rate == 2e-3:
            name = str((Path(settings["save_dir"]) / name).resolve())
        metrics = {"checkpoint": name} | score
        (Path(settings["save_dir"]) / "metrics.json").write_text(json.dumps(metrics))
        time.sleep(0.05)
    table = nb.compare_with_earlier_runs(Path(settings["save_dir"]))
    assert table["roof IoU"].tolist() == [0.1, 0.2] and table["high"].tolist() == [1, 1]
    assert table["changed"].tolist() == ["", "learning_rate: 0.001 is now 0.002"]


def test_after_the_stop_button_the_rest_of_the_notebook_works(tmp_path, small):
    out = tmp_path / "out"
    stopped = run_notebook(
        tmp_path, small | {"save_dir": "out"}, lambda: epochs_done(out) >= 2, SIGINT
    )
    assert KEPT in nbtools.printed(stopped) and 2 <= epochs_done(out) < 10
    assert np.isfinite(json.loads((out / "metrics.json").read_text())["pixel_accuracy"])


def test_after_the_stop_button_the_cell_can_be_run_again(tmp_path, small, undisturbed):
    """With a loader process, which the button stops as well: the end is as if nothing had been."""
    out = tmp_path / "out"
    notebook = run_notebook(
        tmp_path, small | {"save_dir": "out"}, lambda: epochs_done(out) >= 2, SIGINT, again=True
    )
    assert KEPT in nbtools.printed(notebook)
    assert same(undisturbed, state_of(out))

"""What goes wrong while training lasts: disks, numbers, memory, foreign checkpoints."""

import os
import pickle
import re
import resource
import shutil
import zipfile
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from kernels import same, state_of

CPU = torch.device("cpu")
LAST = "rooftop_last.pt"


def limit_files(size):
    """Let no file grow beyond a size in bytes, as a full disk would; None lifts the limit."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard if size is None else size, hard))


@pytest.fixture
def full_disk():
    yield limit_files
    limit_files(None)


@pytest.fixture
def before_saving(nb, monkeypatch):
    """A function that has something happen before the checkpoints of an epoch are written."""

    def arrange(epoch, happen, after=lambda: None):
        finish = nb.keep_finished_epoch

        def disturbed(run, better):
            if len(run.history) == epoch:
                happen()
            finish(run, better)
            if len(run.history) == epoch:
                after()

        monkeypatch.setattr(nb, "keep_finished_epoch", disturbed)

    return arrange


@pytest.fixture
def whole(start, tmp_path):
    """The folder of an undisturbed run of three epochs."""
    start(epochs=3, save_dir=str(tmp_path / "whole"))[1]()
    return tmp_path / "whole"


# ---- writing


def test_a_full_disk_costs_no_training(start, whole, settings, before_saving, full_disk, capsys):
    folder, seen = Path(settings["save_dir"]), []

    def room_again():
        seen.append(torch.load(folder / LAST, weights_only=True)["epoch"])
        full_disk(None)

    before_saving(2, lambda: full_disk(100_000), room_again)
    assert len(start(epochs=3)[1]()) == 3
    text = capsys.readouterr().out
    assert seen == [1]  # the older checkpoint was still readable
    assert (
        f"WARNING: {folder}" in text
        and "MB in a folder that can be written to" in text
        and "Nothing is lost yet" in text
    )
    assert same(state_of(whole), state_of(folder)) and not list(folder.glob("*.part"))


def test_a_disk_that_stays_full_is_named_and_costs_one_more_run_of_the_cell(
    start, whole, settings, before_saving, full_disk
):
    before_saving(2, lambda: full_disk(100_000))
    run, go = start(epochs=3)
    with pytest.raises(
        OSError, match=r"models/rooftop.*\.pt could not be written .*; it needs [\d.]+ MB"
    ):
        go()
    assert torch.load(Path(settings["save_dir"]) / LAST, weights_only=True)["epoch"] == 1
    full_disk(None)
    assert len(go()) == 3
    assert same(state_of(whole), state_of(Path(settings["save_dir"])))


def test_an_interrupt_on_a_full_disk_falls_back_to_what_is_in_memory(
    nb, start, whole, settings, before_saving, full_disk, monkeypatch
):
    before_saving(2, lambda: full_disk(100_000))
    run, go = start(epochs=3)
    calls, forward = [], nb.forward_pass

    def interrupting(*words):
        calls.append(1)
        if len(calls) == 5:  # the first step of the third epoch
            full_disk(None)
            raise KeyboardInterrupt
        return forward(*words)

    monkeypatch.setattr(nb, "forward_pass", interrupting)
    assert len(go()) == 2
    assert len(go()) == 3
    assert same(state_of(whole), state_of(Path(settings["save_dir"])))


def test_a_folder_that_vanishes_takes_no_epoch_with_it(
    nb, start, settings, before_saving, whole, capsys
):
    folder = Path(settings["save_dir"])
    run, go = start(epochs=3)
    before_saving(2, lambda: shutil.rmtree(folder))
    with pytest.raises(ValueError, match="gone from save_dir/cache; run section 2's cells again"):
        go()
    assert "2 finished epochs are kept" in capsys.readouterr().out
    nb.inspect_dataset(run.config)
    assert len(go()) == 3
    lasts = [torch.load(place / LAST, weights_only=True) for place in (whole, folder)]
    assert same(lasts[0]["model"], lasts[1]["model"]) and lasts[1]["epoch"] == 3


def test_a_file_in_the_way_of_save_dir_is_named(nb, settings, tmp_path):
    (tmp_path / "file").write_text("mine")
    for save_dir in (tmp_path / "file", tmp_path / "file" / "deep" / "models"):
        with pytest.raises(
            ValueError, match=r"save_dir = .*file is not a folder that can be written to"
        ):
            nb.make_config(**settings | {"save_dir": str(save_dir)})
    nb.make_config(**settings | {"save_dir": str(tmp_path / "new" / "deep")})
    assert not (tmp_path / "new").exists() and (tmp_path / "file").read_text() == "mine"


def test_a_file_that_takes_the_place_of_save_dir_is_named_and_kept(
    start, settings, before_saving, capsys
):
    folder = Path(settings["save_dir"])

    def replace_folder():
        folder.rename(folder.with_name("moved"))
        folder.write_text("mine")

    before_saving(2, replace_folder)
    with pytest.raises(ValueError, match="gone from save_dir/cache"):
        start(epochs=3)[1]()
    assert capsys.readouterr().out.count("WARNING") == 2  # epoch 2, once more at the end
    assert folder.read_text() == "mine"
    assert torch.load(folder.with_name("moved") / LAST, weights_only=True)["epoch"] == 1


def test_a_write_that_fails_leaves_the_older_file_and_no_other(nb, tmp_path, full_disk):
    path = tmp_path / "deep" / "file.bin"
    nb.write_atomically(path, b"old")
    full_disk(1000)
    with pytest.raises(
        OSError, match=r"file\.bin could not be written \(File too large\); it needs 0\.5 MB"
    ):
        nb.write_atomically(path, b"n" * 500_000)
    full_disk(None)
    assert path.read_bytes() == b"old" and os.listdir(path.parent) == ["file.bin"]


@pytest.mark.parametrize("room", [1000, 2000, 10_000])
def test_pixels_that_find_no_room_stop_the_run_and_leave_nothing(
    nb, settings, write_pair, full_disk, room
):
    for number in range(4):
        write_pair(f"a_{number}")
    config, cache = nb.make_config(**settings), Path(settings["save_dir"], "cache")
    full_disk(room)
    with pytest.raises(OSError, match=r"cache/.*\.npy could not be written .*needs 0\.0 MB in a"):
        nb.inspect_dataset(config)
    full_disk(None)
    assert not list(cache.iterdir())
    assert len(nb.inspect_dataset(config)[0]) == len(list(cache.iterdir())) == 4


def test_what_nobody_needs_any_more_is_removed_and_nothing_else(nb, settings, write_pair):
    """Gone is what was kept of changed or lost files, and what unfinished writes left."""
    for stem in ("a_1", "b_1", "c_1", "d_1", "f_1"):
        write_pair(stem)
    config, folder = nb.make_config(**settings), Path(settings["save_dir"])
    first = {tile.key: tile.pixels for tile in nb.inspect_dataset(config)[0]}
    write_pair("b_1", seed=1)  # new files of the same names
    write_pair("e_1")
    for path in Path(settings["root"]).rglob("d_1*"):
        path.unlink()
    mine = "notes.txt my_tile.npy my_film.part deep/other.part archive/old/rooftop_last.pt".split()
    runs = "cache/read.me rooftop_last.pt rooftop_best_model_iou.pt history.csv split.json".split()
    left = ["rooftop_last.pt.part", "cache/0123456789abcdef.npy.part", "cache/0123456789abcdef.npy"]
    for name in (*mine, *runs, *left):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    now = {tile.key: tile.pixels for tile in nb.inspect_dataset(config)[0]}
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    kept = {f"cache/{path.name}" for path in now.values()}
    assert found == {*mine, *runs, "dataset_report.csv"} | kept and len(kept) == 5
    assert all((folder / name).read_text() == name for name in (*mine, *runs))
    assert [key for key in first if now.get(key) == first[key]] == ["a_1", "c_1", "f_1"]


def test_a_pipe_in_place_of_the_last_checkpoint_is_moved_away(start, settings):
    folder = Path(settings["save_dir"])
    folder.mkdir(parents=True)
    os.mkfifo(folder / LAST)
    assert len(start(epochs=1)[1]()) == 1
    assert (folder / LAST).is_file() and len(list(folder.glob(f"archive/*/{LAST}"))) == 1


# ---- numbers


def spoil_steps(nb, monkeypatch, bad, value=float("nan")):
    """Make the model's answers worthless in some training steps, counted from 0."""
    forward, count = nb.forward_pass, []

    def spoiled(run, images):
        if not run.model.training:
            return forward(run, images)
        count.append(1)
        return forward(run, images * value if bad(len(count) - 1) else images)

    monkeypatch.setattr(nb, "forward_pass", spoiled)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_without_finite_numbers_is_skipped_and_counted(
    nb, start, settings, monkeypatch, capsys, precision, value
):
    spoil_steps(nb, monkeypatch, lambda step: step == 0, value)
    fp16 = precision == "fp16"  # its scale is still being found in the first two epochs
    run, go = start(epochs=3 if fp16 else 2, batch_size=2, precision=precision)
    history = go()
    lines = [line for line in capsys.readouterr().out.splitlines() if "train loss" in line]
    assert re.search("steps skipped: [123]$" if fp16 else "steps skipped: 1$", lines[0])
    assert fp16 or "skipped" not in lines[1]
    for part in (run.model, run.ema):  # statistics too
        assert all(torch.isfinite(tensor).all() for tensor in part.state_dict().values())
    assert np.isfinite([row["train_loss"] for row in history[2 if fp16 else 0 :]]).all()
    assert np.isfinite([row["val_loss"] for row in history]).all()


def test_a_skipped_step_changes_nothing(nb, start, monkeypatch):
    (run, _), loss_fn = start(), nb.CombinedLoss(0.6, 0.4)
    images, labels = torch.randn(4, 3, 64, 64), torch.zeros(4, 64, 64, dtype=torch.long)

    class Loader(list):
        dataset = type("Data", (list,), {"train": True})(range(4))

    def state():  # the number of batches is counted by BatchNorm and used by nothing
        weights = run.model.state_dict()
        return {k: v.clone() for k, v in weights.items() if "num_batches" not in k}

    nb.one_pass(run, Loader([(images, labels, labels)]), loss_fn)
    before = state()
    result, skipped = nb.one_pass(run, Loader([(images * float("nan"), labels, labels)]), loss_fn)
    assert run.skipped_in_a_row == skipped == 1 and same(before, state())
    assert np.isnan(list(result.values())).all()
    nb.one_pass(run, Loader([(images, labels, labels)]), loss_fn)
    assert run.skipped_in_a_row == 0 and not same(before, state())


def test_too_many_in_a_row_stop_and_keep_the_last_good_checkpoint(
    nb, start, whole, settings, monkeypatch, capsys
):
    with monkeypatch.context() as patch:
        spoil_steps(nb, patch, lambda step: step >= 3)  # from the second epoch on
        run, go = start(epochs=30, batch_size=2, save_dir=settings["save_dir"])
        message = "3 steps in a row .*lower learning_rate, or set precision"
        monkeypatch.setattr(nb, "MAX_SKIPPED", 3)
        for _ in range(2):  # the cell is run again
            with pytest.raises(FloatingPointError, match=message):
                go()
            assert run.skipped_in_a_row == 0
    assert len(run.history) == 1
    last = torch.load(Path(settings["save_dir"]) / LAST, weights_only=True)
    assert last["epoch"] == 1 and same(dict(run.ema.state_dict()), dict(last["model"]))
    assert same(dict(run.model.state_dict()), dict(last["learner"]))
    assert "1 finished epochs are kept" in capsys.readouterr().out


def test_fp16_finds_its_scale_by_itself(start, capsys):
    run, go = start(epochs=3, batch_size=2, precision="fp16")
    run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    go()
    assert "steps skipped: 3" in capsys.readouterr().out
    assert 1 <= run.scaler.get_scale() < 2.0**40


def test_fp16_raises_its_scale_while_all_goes_well_and_a_resumed_run_has_it(nb, start, capsys):
    run, go = start(epochs=3, batch_size=2, precision="fp16")
    run.scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2)
    go()  # three steps an epoch
    assert "skipped" not in capsys.readouterr().out
    assert run.scaler.get_scale() == 4.0 * 2 ** (9 // 2)
    again, _ = start(epochs=4, batch_size=2, precision="fp16")
    assert nb.resume_run(again) and again.scaler.state_dict() == run.scaler.state_dict()


def test_a_validation_loss_that_is_no_number_is_never_the_best(nb):
    losses = enumerate([float("nan"), 0.5, float("nan"), 0.4], 1)
    rows = [{"epoch": epoch, "val_loss": loss} for epoch, loss in losses]
    assert nb.best_epoch(rows, "loss") == 4 and nb.best_epoch(rows[:1], "loss") == 0


def cuda_is_full():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.parametrize(
    "fill", [cuda_is_full, lambda: torch.empty(2**55)], ids=["cuda", "really on the CPU"]
)
def test_out_of_memory_names_the_settings_and_keeps_the_checkpoint(
    nb, start, whole, settings, monkeypatch, fill
):
    forward, calls = nb.forward_pass, []

    def filling(*words):
        calls.append(1)
        if len(calls) == 3:
            fill()
        return forward(*words)

    run, go = start(epochs=3)
    monkeypatch.setattr(nb, "forward_pass", filling)
    advice = r"batch_size = 4: set batch_size = 2, or a smaller image_size than 64"
    with pytest.raises(RuntimeError, match=advice):
        go()
    assert torch.load(Path(settings["save_dir"]) / LAST, weights_only=True)["epoch"] == 1
    assert len(go()) == 3
    assert same(state_of(whole), state_of(Path(settings["save_dir"])))


NO_ROOM = (  # how a GPU's libraries say it when their own memory cannot be had
    "FIND was unable to find an engine to execute this computation",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
)


@pytest.mark.parametrize("text", NO_ROOM)
def test_out_of_memory_in_other_words_names_the_settings_too(nb, settings, text):
    config = nb.make_config(**settings)
    assert "set batch_size = 2, or a smaller image_size" in nb.suggest_remedy(
        RuntimeError(text), config
    )


def test_an_error_lets_go_of_the_loader_processes(nb, start, monkeypatch):
    """A notebook keeps the last error, and with it what its traceback holds."""
    children = []

    def fail(*_):
        children.extend(psutil.Process().children())
        raise ValueError("in the middle of an epoch")

    run, go = start(num_workers=1)
    monkeypatch.setattr(nb, "forward_pass", fail)
    with pytest.raises(ValueError, match="in the middle") as caught:
        go()
    assert children and caught.tb
    assert not {child.pid for child in psutil.Process().children()} & {c.pid for c in children}


def test_an_error_that_only_speaks_of_memory_stays_what_it_is(nb, start, monkeypatch):
    run, go = start()
    path = "/mnt/land allocation/allocate memory/s3_1.png"
    errors = [kind(f"cannot read {path}") for kind in (OSError, ValueError, RuntimeError)]
    path = "/mnt/out of memory/not enough memory/shared memory/s3_1.png"
    errors += [kind(f"cannot read {path}") for kind in (OSError, ValueError, KeyError)]
    for error in errors:

        def fail(*_, error=error):
            raise error

        text = str(error)
        monkeypatch.setattr(nb, "forward_pass", fail)
        with pytest.raises(type(error)) as caught:
            go()
        assert caught.value is error and str(caught.value) == text
        assert nb.suggest_remedy(error, run.config) is None


FULL = "unable to allocate shared memory(shm) for file </torch_1_2>: No space left on device (28)"
OTHERS = (  # how PyTorch says the same where it notices later
    "unable to write to file </torch_1_2>: No space left on device (28)",
    "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's "
    "workers are out of shared memory. Please try to raise your shared memory limit.",
)


def test_full_shared_memory_names_the_setting_that_helps(nb, start, settings, monkeypatch):
    one_pass = nb.one_pass

    def fill(run, loader, loss_fn):
        if len(run.history) == 1:
            raise RuntimeError(FULL)
        return one_pass(run, loader, loss_fn)

    run, go = start()
    with monkeypatch.context() as patch, pytest.raises(RuntimeError) as caught:
        patch.setattr(nb, "one_pass", fill)
        go()
    texts = [
        str(caught.value),
        *(nb.suggest_remedy(RuntimeError(text), run.config) for text in OTHERS),
    ]
    for text in texts:
        assert "shared memory" in text and "num_workers = 0" in text
        assert "batch_size" not in text and "out of memory" not in text
    assert str(caught.value.__cause__) == FULL
    assert torch.load(Path(settings["save_dir"]) / LAST, weights_only=True)["epoch"] == 1
    assert len(go()) == 2


def test_full_shared_memory_in_a_loader_process_is_told_as_well(nb, start, monkeypatch):
    """PyTorch passes on a worker's error with the worker's traceback in its text."""

    def fill(*_):
        raise RuntimeError(FULL)

    run, go = start(num_workers=1)
    monkeypatch.setattr(nb.RooftopDataset, "__getitem__", fill)
    with pytest.raises(RuntimeError, match="shared memory.* num_workers = 0") as caught:
        go()
    assert "batch_size" not in str(caught.value)
    assert "in DataLoader worker process" in str(caught.value.__cause__)


def test_too_little_memory_for_a_tile_is_told_as_well(nb, start, monkeypatch):
    def fill(*_):
        raise MemoryError("Unable to allocate 2.00 GiB for an array")

    run, go = start()
    monkeypatch.setattr(nb, "read_tile", fill)
    with pytest.raises(RuntimeError, match="out of memory with batch_size = 4"):
        go()


# ---- checkpoints


@pytest.fixture
def checkpoint(nb, settings):
    """The file of a checkpoint."""
    config = nb.make_config(**settings)
    run = nb.Run(config, CPU, "fp32", {})
    run.history.append({"epoch": 1, "val_loss": 1.0, "val_iou": 0.5, "seconds": 1.0})
    nb.keep_finished_epoch(run, ["iou"])
    return Path(config.save_dir) / nb.BEST_FILES["iou"]


class Evil:
    """What runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch pwned",)


def change(path, **values):
    torch.save(torch.load(path, weights_only=True) | values, path)


DAMAGED = "cut short, damaged or foreign"
CODE = "loading those can run code"
NONE = "is no checkpoint of format 3: an older one needs .* weights alone go into encoder_weights"
SPOILT = {
    "cut short": (lambda path: path.write_bytes(path.read_bytes()[:100_000]), DAMAGED),
    "empty": (lambda path: path.write_bytes(b""), DAMAGED),
    "text": (lambda path: path.write_text("no checkpoint"), DAMAGED),
    "a picture": (lambda path: path.write_bytes(b"\x89PNG\r\n" + bytes(999)), DAMAGED),
    "code": (lambda path: torch.save({"format": 3, "model": Evil()}, path), CODE),
    "code, plainly pickled": (lambda path: path.write_bytes(pickle.dumps(Evil(), 2)), CODE),
    "code beside weights": (lambda path: change(path, versions=Evil()), CODE),
    "a whole model": (lambda path: torch.save(torch.nn.Linear(2, 2), path), CODE),
    "weights alone": (lambda path: torch.save({"conv.weight": torch.ones(3)}, path), NONE),
    "a list": (lambda path: torch.save([1, 2], path), NONE),
    "an older format": (lambda path: change(path, format=2), NONE),
    "no config": (lambda path: change(path, config={}), "cannot be used: "),
    "other weights": (lambda path: change(path, model={"c": torch.ones(3)}), "cannot be used: "),
    "not there": (lambda path: path.unlink(), "it is missing"),
}


@pytest.mark.parametrize(("spoil", "message"), SPOILT.values(), ids=SPOILT.keys())
def test_a_checkpoint_that_is_none_is_named_with_what_it_is(
    nb, checkpoint, spoil, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    spoil(checkpoint)
    with pytest.raises(ValueError, match=message) as caught:
        nb.load_model(checkpoint, CPU)
    assert str(checkpoint) in str(caught.value) and "weights_only" not in str(caught.value)
    assert not Path("pwned").exists()


def test_a_flipped_bit_in_the_weights_is_noticed(nb, checkpoint):
    content = bytearray(checkpoint.read_bytes())
    content[len(content) // 2] ^= 1
    checkpoint.write_bytes(content)
    with pytest.raises(ValueError, match="cut short, damaged"):
        nb.load_model(checkpoint, CPU)


def test_a_compressed_checkpoint_is_refused(nb, checkpoint):
    """A few bytes of it could fill the memory."""
    with zipfile.ZipFile(checkpoint) as parts:
        contents = {name: parts.read(name) for name in parts.namelist()}
    with zipfile.ZipFile(checkpoint, "w", zipfile.ZIP_DEFLATED) as parts:
        for name, content in contents.items():
            parts.writestr(name, content)
    with pytest.raises(ValueError, match="cut short, damaged"):
        nb.load_model(checkpoint, CPU)


def test_an_ensemble_of_files_that_the_run_will_replace_is_refused(nb, settings, checkpoint):
    with pytest.raises(
        ValueError, match="ensemble = .*must be existing files outside of save_dir; .* are not"
    ):
        nb.make_config(**settings | {"ensemble": [str(checkpoint)]})


def test_another_architecture_or_number_of_classes_is_named(nb, checkpoint):
    nb.load_model(checkpoint, CPU, architecture="DeepLabV3Plus", num_classes=2)
    with pytest.raises(ValueError, match="has architecture = 'DeepLabV3Plus', but this run 'Unet'"):
        nb.load_model(checkpoint, CPU, architecture="Unet")
    with pytest.raises(ValueError, match="has num_classes = 2, but this run 3"):
        nb.load_model(checkpoint, CPU, num_classes=3)


def test_a_checkpoint_cannot_have_the_notebook_fetch_a_model(nb, checkpoint, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("asked the network"))
    for name in ("tu-hf-hub:timm/resnet18.a1_in1k", "tu-local-dir:/tmp", "tu-../resnet18"):
        own = torch.load(checkpoint, weights_only=True)["config"]
        change(checkpoint, config=own | {"encoder_name": name})
        with pytest.raises(ValueError, match=rf"(?s)encoder_name.*'{re.escape(name)}'"):
            nb.load_model(checkpoint, CPU)


def test_encoder_weights_that_would_run_code_are_refused(nb, settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"conv1.weight": Evil()}, "evil.pth")
    config = nb.make_config(**settings | {"encoder_weights": "evil.pth"})
    with pytest.raises(ValueError, match=r"evil\.pth was not loaded: it holds Python objects"):
        nb.Run(config, CPU, "fp32", {})
    assert not Path("pwned").exists()

"""What a user can get wrong: exit status 2, one message that names the value and the remedy, and nothing written."""

from __future__ import annotations

import io
import os
import runpy
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path

import pytest
import timm
import torch
from pictures import write_classes
from ranks import run_ranks
from safetensors.torch import save_file

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "finetune.py"
TINY = ("--model", "test_vit", "--weights", "none", "--image-size", "32", "--workers", "0", "--tracker", "none")


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 training and 8 evaluation pictures of two classes."""
    root = tmp_path_factory.mktemp("photos")
    write_classes(root / "train", {"cat": 12, "dog": 12})
    write_classes(root / "val", {"cat": 4, "dog": 4})
    return root


@pytest.fixture(scope="session", autouse=True)
def _imported() -> None:
    """What the recipe imports, once, so that forked processes have it."""
    for module in (
        "safety.checkpoint",
        "tracking.console",
        "data.sources",
        "judging.evaluation",
        "feeds",
        "models.build",
        "plan",
        "tracking.plots",
        "tracking.track",
    ):
        import_module(f"tuning.{module}")


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "outputs" / "run"


def typed(*argv: str) -> tuple[int, str]:
    """Exit status and stderr of the command on a real new process: for what is refused before torch is imported."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(RECIPE), *argv], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == ""
    return done.returncode, done.stderr


def run_main(*argv: str) -> tuple[int, str]:
    """The recipe as ``__main__`` in this process: (exit status, stderr)."""
    sys.argv = [str(RECIPE), *argv]
    said = io.StringIO()
    with redirect_stdout(io.StringIO()), redirect_stderr(said), pytest.raises(SystemExit) as ended:
        runpy.run_path(str(RECIPE), run_name="__main__")
    return int(ended.value.code or 0), said.getvalue()


def forked(*argv: str, processes: int = 1) -> tuple[int, str]:
    """Like `typed`, on processes that have torch already; the answer of rank 0."""
    answers = run_ranks(processes, run_main, *argv)
    assert {status for status, _ in answers} == {answers[0][0]}
    return answers[0]


def assert_refused(answer: tuple[int, str], words: tuple[str, ...], output: Path) -> None:
    status, said = answer
    assert status == 2, said
    assert "Traceback" not in said
    errors = [line for line in said.splitlines() if line.startswith("error")]
    assert len(errors) == 1, said
    assert errors[0].startswith("error: ")
    missing = [word for word in words if word not in errors[0]]
    assert not missing, f"{missing} not in: {errors[0]}"
    assert not output.exists(), sorted(path.name for path in output.rglob("*"))


# (case, flags, what the message must name: the value and the remedy)
AT_ONCE: list[tuple[str, tuple[str, ...], tuple[str, ...]]] = [
    ("negative LR", ("--lr", "-0.1"), ("--lr is -0.1", "above 0")),
    ("zero LR", ("--lr", "0"), ("--lr is 0.0", "above 0")),
    ("NaN LR", ("--lr", "nan"), ("--lr is nan", "above 0")),
    ("infinite LR", ("--lr", "inf"), ("--lr is inf", "above 0")),
    ("NaN freeze LR", ("--freeze-lr", "nan"), ("--freeze-lr is nan", "above 0")),
    ("two decays", ("--layer-decay", "0.7", "--lr-ratio", "0.1"), ("--layer-decay 0.7", "--lr-ratio 0.1", "one of")),
    ("decay above 1", ("--layer-decay", "1.5"), ("--layer-decay is 1.5", "(0, 1]")),
    ("init over weights", ("--weights", "pretrained", "--init", "kaiming"), ("--init kaiming", "--weights none")),
    ("init zero", ("--init", "zero"), ("--init zero", "kaiming, xavier or orthogonal")),
    ("no batch", ("--batch-size", "0"), ("--batch-size is 0", "from 1")),
    ("nothing to train", ("--epochs", "0", "--freeze-epochs", "0"), ("--epochs 0", "raise one")),
    ("long warm-up", ("--warmup-epochs", "50"), ("--warmup-epochs is 50.0", "less than")),
    ("tiny image", ("--image-size", "2"), ("--image-size is 2", "at least 8")),
    ("negative weight decay", ("--weight-decay", "-1"), ("--weight-decay is -1.0", "0 or more")),
    ("dropout of 1", ("--drop-rate", "1"), ("--drop-rate is 1.0", "[0, 1)")),
    ("negative mixup", ("--mixup", "-0.2"), ("--mixup is -0.2", "0 for off")),
    ("tiny cutmix", ("--cutmix", "1e-9"), ("--cutmix is 1e-09", "from 0.01 to 100")),
    ("NaN mixup", ("--mixup", "nan"), ("--mixup is nan", "0 for off")),
    ("mixup of features", ("--mixup", "0.2", "--epochs", "0", "--cache-features"), ("--mixup 0.2", "--cache-features")),
    ("gamma without focal", ("--focal-gamma", "3"), ("--focal-gamma 3.0", "--loss focal")),
    ("negative gamma", ("--loss", "focal", "--focal-gamma", "-1"), ("--focal-gamma is -1.0", "from 0")),
    ("smoothed focal", ("--loss", "focal", "--label-smoothing", "0.1"), ("--label-smoothing 0.1", "Leave one")),
    ("huge seed", ("--seed", "9223372036854775808"), ("--seed is 9223372036854775808", "below 2^63")),
    ("unknown preset", ("--preset", "demmo"), ("'demmo'", "Perhaps you meant 'demo'")),
    ("missing config", ("--config", "nowhere/config.yaml"), ("--config nowhere/config.yaml", "no such file")),
    ("several at once", ("--lr", "nan", "--seed", "-1", "--val-fraction", "7"), ("; give",)),
]


@pytest.mark.parametrize(("flags", "words"), [c[1:] for c in AT_ONCE], ids=[c[0] for c in AT_ONCE])
def test_refused_at_once(photos: Path, output: Path, flags: tuple[str, ...], words: tuple[str, ...]) -> None:
    assert_refused(typed("--data", str(photos), *TINY, "--output", str(output), *flags), words, output)


def test_a_class_that_the_log_cannot_spell_ends_no_run(tmp_path: Path) -> None:
    """A log file on Windows can't hold every letter: what it lacks is escaped."""
    write_classes(tmp_path / "photos" / "train", {"猫": 8, "dog": 8})
    write_classes(tmp_path / "photos" / "val", {"猫": 4, "dog": 4})
    narrow = {**os.environ, "PYTHONIOENCODING": "cp1252", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, RECIPE, "--data", "photos", *TINY, "--batch-size", "8", "--dry-run"]
    done = subprocess.run(command, cwd=tmp_path, env=narrow, capture_output=True, timeout=240)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"\\u732b 8" in done.stdout


def test_letters_that_an_output_lacks_are_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the recipe prints passes through the streams that `run_recipe` has prepared."""
    from tuning.cli.ending import allow_any_letters

    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="cp1252", write_through=True))
    allow_any_letters()
    print("猫 ± ½")
    assert written.getvalue() == b"\\u732b \xb1 \xbd\n"


def test_a_printed_config_is_utf8_everywhere(tmp_path: Path) -> None:
    narrow = {**os.environ, "PYTHONIOENCODING": "cp1252"}
    command = [sys.executable, RECIPE, "--data", "猫", "--print-config"]
    done = subprocess.run(command, cwd=tmp_path, env=narrow, capture_output=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, b"")
    assert "data: 猫\n".encode() in done.stdout


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("epoch: 3", ("'epoch'", "Perhaps you meant 'epochs'")),
        ("schedule: cosin", ("'cosin'", "Perhaps you meant 'cosine'")),
        ("lr: fast", ("'fast'", "a number")),
        ("stages: [{open: all, epoch: 3}]", ("stage 1", "'epoch'", "Perhaps you meant 'epochs'")),
        ("stages: [{open: everything}]", ("'everything'", "give head, all")),
        ("stages: [{open: 150%}]", ("1.5", "a fraction")),
        ("stages: [{epochs: 3}]", ("stage 1", "add open")),
        ("lr: [", ("can't be read as YAML",)),
        ("lr: 1e400", ("--lr is inf", "above 0")),
    ],
)
def test_bad_yaml_is_refused(photos: Path, output: Path, tmp_path: Path, content: str, words: tuple[str, ...]) -> None:
    preset = tmp_path / "preset.yaml"
    preset.write_text(content, encoding="utf-8")
    answer = typed("--data", str(photos), "--output", str(output), "--preset", str(preset))
    assert_refused(answer, words, output)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--modle", "resnet18"), ("--modle", "Perhaps you meant", "--model")),
        (("--schedule", "cosin"), ("'cosin'", "--schedule", "'cosine'")),
        (("--lr", "fast"), ("fast", "--lr")),
        (("--loss", "bse"), ("'bse'", "'bce'", "--loss")),
        (("--epochs", "2.5"), ("2.5", "--epochs")),
    ],
)
def test_malformed_flags_are_refused(output: Path, flags: tuple[str, ...], words: tuple[str, ...]) -> None:
    """The parser's own frame around the message takes the place of ``error:``."""
    status, said = typed("--data", "photos", "--output", str(output), *flags)
    assert status == 2
    assert "Traceback" not in said
    assert said.count("╭") == 1, said
    assert all(word in said for word in words), said
    assert not output.exists()


# (case, flags, words): what only the data, the model or the machine can tell.
LATER: list[tuple[str, tuple[str, ...], tuple[str, ...]]] = [
    ("missing folder", ("--data", "no/such/folder"), ("no/such/folder",)),
    ("unknown model", ("--model", "resnet81"), ("'resnet81'", "Perhaps you meant 'resnet18'")),
    ("unknown tag", ("--model", "resnet18.a1_in1", "--weights", "pretrained"), ("'a1_in1'", "'a1_in1k'", "Known: ")),
    ("not a model folder", ("--model", "local-dir:nowhere"), ("'nowhere'", "config.json")),
    ("unknown optimizer", ("--optimizer", "adamww"), ("'adamww'", "Perhaps you meant 'adamw'")),
    ("micro-batch", ("--batch-size", "24", "--micro-batch", "5"), ("--micro-batch 5", "24 images", "one of 1, 2, 3")),
    ("batch above the data", ("--batch-size", "25"), ("--batch-size 25", "24 images", "at most 24")),
    ("image size", ("--image-size", "50"), ("--image-size 50", "multiple of 16")),
    ("missing weights", ("--weights", "nowhere.pth"), ("'nowhere.pth'", ".safetensors or .pth")),
    ("fp16 on a CPU", ("--precision", "fp16"), ("fp16 needs a GPU", "bf16 or fp32")),
    ("unfetched weights", ("--weights", "pretrained"), ("test_vit", "--weights none")),
    ("unknown sub-folder", ("--train-split", "trian"), ("'trian'", "Perhaps you meant 'train'")),
    ("too few images", ("--limit-train", "1"), ("--limit-train 1", "2 classes")),
    ("two cures", ("--sampling", "sqrt", "--class-weights", "balanced"), ("--sampling sqrt", "count twice")),
    ("erasing above 1", ("--random-erasing", "1.5"), ("--random-erasing is 1.5", "a probability in [0, 1]")),
    ("mixup of one", ("--mixup", "0.2", "--micro-batch", "1"), ("--mixup 0.2", "only 1", "--micro-batch")),
    ("cutmix of one", ("--cutmix", "1", "--batch-size", "1"), ("--cutmix 1", "only 1", "--batch-size")),
    ("missing checkpoint", ("--resume", "no/checkpoint"), ("no/checkpoint", "--resume auto")),
    ("huge LR", ("--lr", "1e308", "--lr-scaling", "linear", "--lr-batch", "1"), ("--lr",)),
]


@pytest.mark.parametrize(("flags", "words"), [c[1:] for c in LATER], ids=[c[0] for c in LATER])
def test_refused_before_training(photos: Path, output: Path, flags: tuple[str, ...], words: tuple[str, ...]) -> None:
    answer = forked("--data", str(photos), *TINY, "--batch-size", "8", "--output", str(output), *flags)
    assert_refused(answer, words, output)


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ({}, ("holds no pictures", "expected class folders")),
        ({"train/cat": 0, "train/dog": 0}, ("holds no", "expected class folders")),
        ({"train/cat": 6, "val/cat": 2}, ("only one class", "'cat'", "two or more")),
        ({"train/cat": 6, "train/dog": 6, "val/dgo": 2}, ("classes that train lacks: dgo", "Perhaps you meant 'dog'")),
        ({"train/cat": 6, "train/dog": 6, "val/cat": 0}, None),
    ],
    ids=["empty", "empty classes", "one class", "class that train lacks", "empty val holds out"],
)
def test_bad_data(tmp_path: Path, output: Path, counts: dict[str, int], words: tuple[str, ...] | None) -> None:
    data = tmp_path / "data"
    data.mkdir()
    write_classes(data, counts)
    answer = forked("--data", str(data), *TINY, "--batch-size", "4", "--output", str(output), "--dry-run")
    if words is None:
        assert answer == (0, "")
    else:
        assert_refused(answer, (str(data), *words), output)


def test_a_file_as_data(photos: Path, output: Path) -> None:
    picture = str(next(photos.rglob("*.jpg")))
    assert_refused(forked("--data", picture, *TINY, "--output", str(output)), (picture, "is a file", "folder"), output)


def test_weights_of_another_architecture(photos: Path, output: Path, tmp_path: Path) -> None:
    weights = tmp_path / "resnet.safetensors"
    save_file(timm.create_model("test_resnet", num_classes=2).state_dict(), weights)
    answer = forked("--data", str(photos), *TINY, "--output", str(output), "--weights", str(weights))
    assert_refused(answer, (str(weights), "do not fit", "Choose the --model"), output)


@pytest.mark.parametrize("content", [b"", b"no weights at all", b"\x80\x04K\x01."])
def test_weights_that_are_none(photos: Path, output: Path, tmp_path: Path, content: bytes) -> None:
    weights = tmp_path / "weights.pth"
    weights.write_bytes(content)
    answer = forked("--data", str(photos), *TINY, "--output", str(output), "--weights", str(weights))
    assert_refused(answer, (str(weights), "weights"), output)


def test_weights_cannot_run_code(photos: Path, output: Path, tmp_path: Path) -> None:
    weights, trace = tmp_path / "weights.pth", tmp_path / "trace"
    torch.save({"w": _Opens(trace)}, weights)
    answer = forked("--data", str(photos), *TINY, "--output", str(output), "--weights", str(weights))
    assert_refused(answer, (str(weights), "weights"), output)
    assert not trace.exists()


class _Opens:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return open, (str(self.path), "w")


def test_a_batch_that_two_processes_cannot_share(photos: Path, output: Path) -> None:
    answer = forked("--data", str(photos), *TINY, "--output", str(output), "--batch-size", "7", processes=2)
    assert_refused(answer, ("--batch-size 7", "2 processes", "Choose 6 or 8"), output)


def test_an_output_that_is_a_file(photos: Path, tmp_path: Path) -> None:
    file = tmp_path / "taken"
    file.write_text("mine")
    status, said = forked("--data", str(photos), *TINY, "--batch-size", "8", "--output", str(file))
    assert (status, said) == (2, f"error: --output {file} is a file. Choose a folder.\n")
    assert file.read_text() == "mine"


def test_an_output_that_holds_another_run(photos: Path, output: Path) -> None:
    output.mkdir(parents=True)
    (output / "config.yaml").write_text("lr: 0.1\n")
    argv = ("--data", str(photos), *TINY, "--batch-size", "8", "--output", str(output))
    status, said = forked(*argv)
    assert status == 2
    assert said.startswith(f"error: --output {output} holds another run. ")
    assert "--resume auto, or choose another --output" in said
    status, said = forked(*argv, "--resume", "auto")
    assert status == 2
    assert "--lr was 0.1, now 0.0003" in said
    assert [path.name for path in output.iterdir()] == ["config.yaml"]


def test_a_launcher_shows_one_message(photos: Path, output: Path) -> None:
    """Two real processes: the second gives the first time to speak."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(RECIPE)]
    argv = ["--data", str(photos), *TINY, "--output", str(output), "--lr", "nan"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run([*torchrun, *argv], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert [line for line in done.stderr.splitlines() if "--lr is nan" in line] == [
        "error: --lr is nan; give auto or a rate above 0, for example 3e-4."
    ]
    assert not output.exists()


def test_good_input_is_not_refused(photos: Path, output: Path) -> None:
    """The cases above fail for their own reason: without it the same command plans a run."""
    assert forked("--data", str(photos), *TINY, "--batch-size", "8", "--output", str(output), "--dry-run") == (0, "")
    shutil.rmtree(output)

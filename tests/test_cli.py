"""The `festina` command: output, files and exit codes; demo and bench compare like with like."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import festina
from festina import cli
from festina.cli import bench as benchmark
from festina.cli.demo import text
from festina.cli.demo.training import Race, Settings
from festina.cli.demo.world import World

ROOT = Path(__file__).parent.parent
TINY = ["--steps", "4", "--hidden", "8", "--batch", "4", "--length", "8", "--threads", "1"]
MODELS = ("torch.nn.LSTM", "festina.LSTM", "festina.LayerNormLSTM")


@pytest.fixture(scope="module")
def novel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file with a non-ASCII letter and a character too rare for the vocabulary."""
    path = tmp_path_factory.mktemp("text") / "novel.txt"
    path.write_text("The snail and the hare: festina lente, ça va. ☃\n" * 9 + "make haste, steadily. " * 400, "utf-8")
    return path


@pytest.fixture(autouse=True)
def one_thread():
    """One thread is fastest for such small work; restored afterwards, because --threads changes it for the whole process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def start(*args: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """`festina ARGS` in a separate process."""
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "festina", *args],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_info_prints_versions_and_backends(capsys):
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert festina.__version__ in out
    assert torch.__version__ in out
    for name in festina.backends.names():
        assert name in out


def test_info_json_gives_every_backend_a_state(capsys):
    assert cli.main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["festina"] == festina.__version__
    assert facts["threads"]["used"] == torch.get_num_threads()
    states = {state["backend"]: state["reasons"]["cpu"] for state in facts["backends"]}
    assert list(states) == list(festina.backends.names())
    assert states["eager"] is None, "the reference runs everywhere"
    isas = {state["backend"]: state["isa"] for state in facts["backends"]}
    assert isas["eager"] is None
    assert (isas["cpu"] is None) == (states["cpu"] is not None), "a core that can run has an instruction set"


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"festina {festina.__version__}\n"


def test_demo_writes_figures_picture_and_sample(novel, tmp_path, capsys):
    out = tmp_path / "new" / "folder"
    assert cli.main(["demo", "--text", str(novel), "--out", str(out), *TINY]) == 0
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")
    figures = json.loads((out / "demo.json").read_text())
    assert figures["finished"]
    assert figures["steps_done"] == 4

    conditions = figures["conditions"]
    assert conditions["text"]["name"] == "novel.txt"
    assert {"seed": 0, "hidden": 8, "batch": 4, "length": 8, "threads": 1, "processes": 1}.items() <= conditions.items()

    assert tuple(figures["models"]) == MODELS
    for model in figures["models"].values():
        assert len(model["training"]["bits_per_character"]) == len(model["training"]["seconds"]) == 4
        quarters = model["validation"]["at_percent"]
        assert list(quarters) == ["25", "50", "75", "100"]
        assert quarters["100"] < quarters["25"], "it learns"
        assert model["tokens_per_second"] == pytest.approx(4 * 8 / model["ms_per_step"] * 1e3)

    assert figures["sample"]["model"] == "festina.LayerNormLSTM"
    assert figures["sample"]["text"].startswith(figures["sample"]["prompt"])
    assert len(figures["sample"]["text"]) == 400 + len(figures["sample"]["prompt"])
    printed = capsys.readouterr().out
    for name in MODELS:
        assert name in printed


def test_demo_plain_layer_equals_torch_nn(novel):
    race = make_race(novel, steps=4)
    for _ in range(4):
        race.round()
    plain, ours, normed = (racer.record.validation_bits for racer in race.racers)
    assert ours == pytest.approx(plain, abs=1e-5)
    assert normed != pytest.approx(plain, abs=1e-3)


def make_race(path: Path, *, layers: int = 1, models: tuple[str, ...] = MODELS, **settings: float) -> Race:
    full = {"hidden": 8, "batch": 4, "length": 8, "lr": 5e-3, "seed": 0, **settings}
    return Race(Settings(models=models, layers=layers, **full), text.from_file(path), torch.device("cpu"), World())


@pytest.mark.parametrize("layers", [1, 2])
def test_resumed_run_equals_an_uninterrupted_one(novel, tmp_path, layers):
    models = ("torch.nn.LSTM", "festina.LayerNormLSTM", "festina.LayerNormGRU")
    whole = make_race(novel, layers=layers, models=models, steps=6)
    for _ in range(6):
        whole.round()

    half = make_race(novel, layers=layers, models=models, steps=6)
    for _ in range(3):
        half.round()
    half.save(tmp_path / "half.pt")
    rest = make_race(novel, layers=layers, models=models, steps=6)
    rest.load(tmp_path / "half.pt")
    assert rest.done == 3
    for _ in range(3):
        rest.round()

    for want, got in zip(whole.racers, rest.racers, strict=True):
        assert got.record.bits == want.record.bits
        assert got.record.validation_bits == want.record.validation_bits
        for name, value in want.model.state_dict().items():
            assert torch.equal(got.model.state_dict()[name], value), name


def test_finished_checkpoint_is_shown_again(novel, tmp_path, capsys):
    args = ["demo", "--text", str(novel), "--checkpoint", str(tmp_path / "run.pt"), *TINY, "--out"]
    assert cli.main([*args, str(tmp_path / "once")]) == 0
    assert cli.main([*args, str(tmp_path / "again")]) == 0
    once, again = (json.loads((tmp_path / name / "demo.json").read_text()) for name in ("once", "again"))
    assert again["models"] == once["models"]
    assert again["sample"] == once["sample"]


def test_checkpoint_of_another_run_is_refused(novel, tmp_path):
    race = make_race(novel, steps=4)
    race.save(tmp_path / "run.pt")
    with pytest.raises(cli.UsageError, match="steps was 4, is 5"):
        make_race(novel, steps=5).load(tmp_path / "run.pt")
    (tmp_path / "noise.pt").write_bytes(b"no checkpoint")
    torch.save({"done": 1, "racers": Path("an object")}, tmp_path / "object.pt")
    for name in ("noise.pt", "object.pt"):
        with pytest.raises(
            cli.UsageError, match="not a checkpoint of this demo: it is damaged, or holds objects other"
        ):
            race.load(tmp_path / name)


def test_a_damaged_checkpoint_changes_nothing(novel, tmp_path):
    race = make_race(novel, models=("festina.LSTM",), steps=4)
    race.save(tmp_path / "run.pt")
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    racers = race.racers
    for content in (
        [],
        {},
        {**saved, "conditions": None},
        {**saved, "done": "four"},
        {**saved, "racers": {}},
        *(
            {**saved, "racers": {"festina.LSTM": {**saved["racers"]["festina.LSTM"], part: 7}}}
            for part in ("model", "record")
        ),
    ):
        torch.save(content, tmp_path / "run.pt")
        with pytest.raises(cli.UsageError, match="is not a checkpoint of this demo"):
            race.load(tmp_path / "run.pt")
        assert race.racers is racers
    os.mkfifo(tmp_path / "pipe.pt")
    with pytest.raises(cli.UsageError, match="is not a checkpoint of this demo"):
        race.load(tmp_path / "pipe.pt")


def test_ctrl_c_saves_the_steps_done(novel, tmp_path):
    args = ["--text", str(novel), "--checkpoint", str(tmp_path / "run.pt"), "--out", str(tmp_path), *TINY]
    with start("demo", *args, "--steps", "2000", "--models", "torch.nn.LSTM") as process:
        for line in process.stdout:
            if line.startswith("step "):  # the first validation is done
                process.send_signal(signal.SIGINT)
                break
        rest, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert "stopped after step" in rest

    figures = json.loads((tmp_path / "demo.json").read_text())
    assert not figures["finished"]
    assert 100 <= figures["steps_done"] < 2000
    assert (tmp_path / "demo.png").exists()
    assert torch.load(tmp_path / "run.pt", weights_only=True)["done"] == figures["steps_done"]


@pytest.mark.distributed
def test_two_processes_give_the_result_of_one(novel, tmp_path):
    args = ["demo", "--text", str(novel), *TINY, "--out"]
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    two = start(*args, str(tmp_path / "two"), "--checkpoint", str(tmp_path / "two.pt"), launcher=launcher)
    one = start(*args, str(tmp_path / "one"))
    for process in (one, two):
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    one, two = (json.loads((tmp_path / name / "demo.json").read_text()) for name in ("one", "two"))
    assert two["conditions"]["processes"] == 2
    for name in MODELS:
        want, got = one["models"][name], two["models"][name]
        assert got["training"]["bits_per_character"] == pytest.approx(want["training"]["bits_per_character"], abs=1e-4)
        got, want = (model["validation"]["bits_per_character"] for model in (got, want))
        assert got == pytest.approx(want, abs=1e-4)

    # One process can resume a run of two: the checkpoint holds the state of all rows.
    race = make_race(novel, steps=4, lr=1e-2)
    race.load(tmp_path / "two.pt")
    assert all(part.shape[1] == 4 for racer in race.racers for part in racer.state)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--text", "no/such/file"], "--text no/such/file cannot be read"),
        (["--batch", "400"], "the text is too short"),
        (["--models", "festina.LSTM", "festina.LSTM"], "--models must name each model once"),
        (["--device", "nonsense"], "--device nonsense cannot be used"),
        (["--checkpoint", __file__], "is not a checkpoint of this demo"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_demo_explains_what_it_cannot_do(novel, tmp_path, capsys, args, message):
    assert cli.main(["demo", "--text", str(novel), *TINY, "--out", str(tmp_path), *args]) == 2
    error = capsys.readouterr().err
    assert error.startswith("festina: ")
    assert message in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("args", [["--steps", "0"], ["--lr", "0"], ["--hidden", "many"], ["--models", "Transformer"]])
def test_demo_refuses_bad_options(capsys, args):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["demo", *args])
    assert args[0] in capsys.readouterr().err


def test_demo_refuses_text_that_is_not_utf_8(tmp_path, capsys):
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    assert cli.main(["demo", "--text", str(tmp_path / "latin.txt"), "--out", str(tmp_path)]) == 2
    assert "must be text in UTF-8, but byte 2 is not" in capsys.readouterr().err


def test_missing_extra_is_named(monkeypatch, capsys):
    monkeypatch.setattr("festina.cli.demo.find_spec", lambda name: None)
    assert cli.main(["demo"]) == 2
    assert "pip install 'festina[demo]'" in capsys.readouterr().err


def test_package_and_info_need_no_extra():
    code = (
        "import sys; sys.modules.update(rich=None, matplotlib=None, safetensors=None)\n"
        "from festina.cli import main; sys.exit(main(['info']))"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, timeout=60)


def test_standard_library_corpus():
    corpus = text.standard_library()
    assert len(corpus.train) > 1_000_000
    assert 0.03 < len(corpus.validation) / len(corpus.train) < 0.15
    assert corpus.sha256 == text.standard_library().sha256
    assert (corpus.train == 0).float().mean() < 0.01, "hardly any character is unknown"


def test_windows_follow_one_another():
    windows = text.Windows(torch.arange(100), rows=3, length=4)
    (inputs, targets), (after, _) = windows[0], windows[1]
    assert inputs.shape == (4, 3)
    assert torch.equal(targets, inputs + 1)
    assert torch.equal(after[0], targets[-1])
    assert len(windows) == 33 // 4


def bench(tmp_path: Path, *args: str) -> tuple[int, list[dict]]:
    out = tmp_path / "results.jsonl"
    sizes = ("--batch", "3", "--input", "5", "--hidden", "7", "--steps", "9", "--seconds", "0")
    status = cli.main(["bench", *sizes, "--out", str(out), *args])
    return status, [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []


def test_bench_measures_every_pass_against_its_peers(tmp_path):
    others = {"forward": {"loop"}, "forward+backward": {"loop"}, "ragged": {"full"}, "resets": {"plain"}}
    others |= {"step": set(), "stepping": set()}
    status, rows = bench(tmp_path, "--cells", "lstm", "gru", "--passes", *others, "--loop")
    assert status == 0
    assert [(row["case"].split("-")[0], row["pass"]) for row in rows] == list(
        itertools.product(("lstm", "gru"), others)
    )
    for row in rows:
        assert set(row["ratio"]) == {"torch.nn"} | others[row["pass"]]
        assert all(0 < p20 <= median <= p80 for median, p20, p80 in row["ratio"].values())
        assert row["runs"] >= 7


def test_bench_prints_no_number_for_a_wrong_result(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(benchmark.ALLOWED, torch.float32, 1e-12)
    status, rows = bench(tmp_path)
    assert (status, rows) == (1, [])
    assert "differs from the float64 reference" in " ".join(capsys.readouterr().out.split())


def test_lengths_of_the_ragged_batch():
    point = benchmark.Point(cell="lstm", plan="HASTE", T=200, B=64, I=1, H=1, dtype="float32")
    lengths = point.lengths()
    assert (min(lengths), max(lengths), len(lengths)) == (25, 200, 64)
    assert point.gflop("ragged") / point.gflop("forward+backward") == pytest.approx(sum(lengths) / (200 * 64))

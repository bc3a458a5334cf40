"""What a run reports: resumed lines, the picture, Weights & Biases (a stand-in for it)."""

import json
import sys
import time
import types

import pytest

from mixreorg_fast.errors import UserError
from mixreorg_fast.training.plots import draw_losses
from mixreorg_fast.training.preparation import check_inputs
from mixreorg_fast.training.reports import MetricsLog, RankTimes, Stopwatch
from tests.tiny import tiny_config

pytest.importorskip("tensorboard")


class Stand:
    """Stands for the wandb module, and for the run that its init returns."""

    class Error(Exception):
        pass

    def __init__(self):
        self.begun, self.logged, self.ended, self.fails = [], [], 0, False

    def init(self, **arguments):
        if self.fails:
            raise self.Error("no API key configured")
        self.begun.append(arguments)
        return types.SimpleNamespace(
            log=self.logged.append, finish=self.finish, define_metric=lambda name, step_metric: None
        )

    def finish(self):
        self.ended += 1


@pytest.fixture
def wandb(monkeypatch):
    stand = Stand()
    monkeypatch.setitem(sys.modules, "wandb", stand)
    return stand


@pytest.fixture
def run(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"name": "x"}))
    return tmp_path


def test_resumed_reports_go_on_under_the_same_id(run, wandb):
    values = {"loss": 2.0, "rank_seconds": {"max": 0.5, "host": "a"}}
    log = MetricsLog(run, 0, 9, wandb="project")
    for step in (1, 2, 3):
        log.write(step, values)
    log.close()
    assert wandb.logged[-1] == {"step": 3, "loss": 2.0, "rank_seconds/max": 0.5} and wandb.ended == 1
    log = MetricsLog(run, 2, 9, wandb="project")  # a checkpoint was at step 2
    log.write(3, {"loss": 1.0})
    log.close()
    first, again = wandb.begun
    assert first["id"] == again["id"] and first["resume"] == "allow" and first["config"] == {"name": "x"}
    assert (first["project"], first["name"], first["dir"]) == ("project", run.name, str(run))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 2.0), (2, 2.0), (3, 1.0)]
    with pytest.raises(UserError, match="reports to the project project; log.wandb is now other"):
        MetricsLog(run, 2, 9, wandb="other")


def test_what_weights_and_biases_lacks_is_said_in_one_line(run, wandb, monkeypatch):
    wandb.fails = True
    with pytest.raises(UserError, match="no API key configured .WANDB_MODE=offline"):
        MetricsLog(run, 0, 9, wandb="project")
    assert not (run / "wandb.json").exists()
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    config = tiny_config(log={"wandb": "project"}).model_copy(update={"output": str(run)})
    with pytest.raises(UserError, match="pip install wandb"):
        check_inputs(config, resuming=False)  # before anything is made
    assert not config.run_folder.exists()


def test_without_it_nothing_is_imported(run, wandb):
    MetricsLog(run, 0, 9).close()
    assert not wandb.begun


def test_picture(run, monkeypatch):
    lines = [{"step": s, "loss": 3 / s, "loss_mixed": 1.0, "lr": 1e-3, "grad_norm": None} for s in range(1, 5)]
    lines.append({"step": 4, "validation": {"scenes_mIoU": 3.0}})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    assert draw_losses(run) is None and not (run / "losses.png").exists()
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    assert draw_losses(run).read_bytes().startswith(b"\x89PNG")


def test_a_slow_rank_is_named_once(monkeypatch):
    world = types.SimpleNamespace(size=1, rank=0)
    ranks = RankTimes(world, slow=0.2)

    def remark(*times: float) -> str | None:
        mean, top = sum(times) / len(times), max(times)
        return ranks.remark({"mean": mean, "max": top, "slowest": times.index(top), "host": "node"})

    assert remark(1.0, 1.1, 1.0) is None
    assert remark(1.0, 2.0, 1.0) is None  # once may be chance
    assert "rank 1 on node is slow: 2.2 s of a step until the first exchange, 57%" in remark(1.0, 2.2, 1.0)
    assert remark(1.0, 2.0, 1.0) is None  # said already
    assert remark(1.0, 1.0, 1.0) is None and remark(1.0, 1.0, 1.0) is None
    assert remark(2.0, 1.0, 1.0) is None and "rank 0" in remark(2.0, 1.0, 1.0)


def test_stopwatch(device):
    watch, begin = Stopwatch(device), time.perf_counter()
    for _ in range(2):
        watch.start()
        watch.start()  # goes on
        time.sleep(0.05)
        watch.stop()
        time.sleep(0.2)
        watch.stop()  # has ended
    assert 0.09 < watch.seconds() < time.perf_counter() - begin - 0.35
    watch.restart()
    assert watch.seconds() == 0

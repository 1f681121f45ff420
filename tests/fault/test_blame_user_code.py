"""Bugs of the user's code end the run as such, at the first occurrence, whatever form they take."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
from user_scripts import Left, run_script

pytestmark = pytest.mark.timeout(300)

AT_ONE_SAMPLE = """
def loss(model, batch):
    if POISON in batch["id"]:
        {what}
    return LossSum(model(batch["x"]).square().sum(), batch["x"].numel())
"""


def at_one_sample(what: str) -> str:
    return AT_ONE_SAMPLE.replace("{what}", what)


def assert_user_error(left: Left, *, line: str, phase: str, step: int | None = None) -> None:
    """Exit 1, one user error in record, exception and screen alike, and nobody lost."""
    assert left.code == 1, left.err[-2000:]
    error = left.of("user_error")[0]
    (end,) = left.of("run_finished")
    assert (end["status"], end["cause"]) == ("failed", "user_code")
    assert error["phase"] == phase
    assert error["where"].startswith(f"{left.script}:{left.line_of(line)} ")
    assert error["rank"] >= 0 or phase == "build"
    if step is not None:
        assert error["step"] == step
        assert left.steps == list(range(1, step))
    assert not left.of("node_lost")
    assert "UserCodeError" in left.err
    left.assert_tail_names(line)


@pytest.mark.slow
def test_a_schedule_that_divides_by_zero_is_the_users_error_at_its_step(tmp_path: Path) -> None:
    """C3: ``schedule=lambda s: 1/(3-s)``."""
    left = run_script(tmp_path, 'options["schedule"] = lambda s: 1/(3-s)')
    assert_user_error(left, line="1/(3-s)", phase="schedule", step=3)
    assert "ZeroDivisionError" in left.err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("sys.exit(4)", "SystemExit: 4"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("os._exit(4)", "os._exit(4)"),
        ('raise ValueError("bad \\udcff label " + "x" * 10_000_000)', "ValueError: bad \\udcff"),
        ('raise ValueError("a\\0b")', "ValueError: a\\x00b"),
        ("raise SystemExit(0)", "SystemExit: 0"),
        ("raise GeneratorExit", "GeneratorExit"),
        ("raise MemoryError", "MemoryError"),
        ("(lambda f: f(f))(lambda f: f(f))", "RecursionError: maximum recursion depth"),
        (
            'raise type("Bad", (Exception,), {"__str__": lambda self: 1 / 0})',
            "Bad: (its __str__ raised ZeroDivisionError)",
        ),
    ],
    ids=[
        "exit",
        "interrupt",
        "os-exit",
        "long-surrogate",
        "nul",
        "exit-0",
        "generator",
        "memory",
        "recursion",
        "no-text",
    ],
)
def test_whatever_leaves_the_loss_at_one_sample_names_line_step_rank_and_samples(
    tmp_path: Path, what: str, said: str
) -> None:
    """C3 and C7: leaving the process, and texts that no encoding takes."""
    left = run_script(tmp_path, at_one_sample(what))
    assert_user_error(left, line=what[:20], phase="forward")
    error = left.of("user_error")[0]
    assert 23 in error["sample_ids"] and len(error["sample_ids"]) <= 2
    assert said in error["error"] and len(error["traceback"]) < 100_000
    assert len(left.err) < 200_000
    assert f"step {error['step']}" in left.err and "23" in left.err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "line", "phase"),
    [
        (
            """
            class Breaks(torch.optim.AdamW):
                def step(self, closure=None):
                    self.calls = getattr(self, "calls", 0) + 1
                    if self.calls == 4:
                        raise RuntimeError("optimizer is broken")
                    return super().step(closure)
            options["optimizer"] = lambda groups: Breaks(groups, lr=0.01)
            """,
            'raise RuntimeError("optimizer',
            "optimizer",
        ),
        (
            """
            class Data(Data):
                def __getitem__(self, i):
                    if i == POISON:
                        raise KeyError(i)
                    return super().__getitem__(i)
            """,
            "raise KeyError(i)",
            "data",
        ),
        (
            """
            def collate(items):
                if any(int(i["id"]) == POISON for i in items):
                    sys.exit("no such sample")
                return {k: torch.stack([i[k] for i in items]) for k in items[0]}
            options["collate"] = collate
            """,
            'sys.exit("no such',
            "data",
        ),
        (
            """
            class Hook:
                def on_gradients(self, ctx, grads):
                    raise LookupError("no gradient")
            options["hooks"] = [Hook()]
            """,
            'raise LookupError("no grad',
            "on_gradients",
        ),
        (
            """
            class Hook:
                def on_commit(self, ctx, step):
                    if step == 2:
                        raise LookupError("no file")
            options["hooks"] = [Hook()]
            """,
            'raise LookupError("no file',
            "on_commit",
        ),
        (
            """
            class Held(Data):
                def __getitem__(self, i):
                    raise OSError("held-out data is gone")
            options["eval_data"] = Held()
            settings = ["eval.every=2"]
            """,
            'raise OSError("held-out',
            "evaluate",
        ),
        (
            """
            def model(ctx):
                raise FileNotFoundError("weights.pt")
            """,
            "raise FileNotFoundError",
            "build",
        ),
        (
            """
            class Breaks(torch.autograd.Function):
                @staticmethod
                def forward(ctx, x):
                    return x.clone()
                @staticmethod
                def backward(ctx, g):
                    raise ArithmeticError("no derivative")
            def loss(model, batch):
                total = Breaks.apply(model(batch["x"])).square().sum()
                return LossSum(total, batch["x"].numel())
            """,
            'raise ArithmeticError("no der',
            "backward",
        ),
        (
            """
            def seen(module, given, made):
                raise BufferError("from a forward hook")
            def model(ctx):
                made = Model()
                made.head.register_forward_hook(seen)
                return made
            """,
            "raise BufferError",
            "forward",
        ),
        (
            """
            def seen(gradient):
                raise BufferError("from a gradient hook")
            def model(ctx):
                made = Model()
                made.head.weight.register_hook(seen)
                return made
            """,
            "raise BufferError",
            "backward",
        ),
        (
            """
            class Data(Data):
                def __getitem__(self, i):
                    self.left = getattr(self, "left", None) or (n for n in range(9))
                    next(self.left)
                    return super().__getitem__(i)
            """,
            "next(self.left)",
            "data",
        ),
        (
            """
            class Data:
                def __iter__(self):
                    yield {"id": torch.tensor(0), "x": torch.zeros(4, 8)}
            """,
            "def __iter__(self):",
            "build",
        ),
    ],
    ids=[
        "optimizer",
        "data",
        "collate",
        "hook",
        "on_commit",
        "eval",
        "builder",
        "backward",
        "forward-hook",
        "gradient-hook",
        "generator-ends",
        "no-source",
    ],
)
def test_every_function_of_the_users_may_raise(
    tmp_path: Path, body: str, line: str, phase: str
) -> None:
    """C3: exceptions in optimizer, data, collate, hooks, evaluation, builder and backward."""
    left = run_script(tmp_path, textwrap.dedent(body))
    assert_user_error(left, line=line, phase=phase)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "number"), [("ctypes.string_at(0)", "SIGSEGV"), ("os.abort()", "SIGABRT")]
)
def test_a_native_crash_is_a_poisoned_step_at_the_second_death(
    tmp_path: Path, what: str, number: str
) -> None:
    """C3: SIGSEGV or SIGABRT at one sample costs two nodes of four, and names line and sample."""
    left = run_script(tmp_path, at_one_sample(what), nodes=4)
    assert left.code == 1
    deaths = left.of("worker_died")
    assert [d["cause"] for d in deaths] == [number, number]
    assert all(f"line {left.line_of(what)} in loss" in d["traceback"] for d in deaths)
    (error,) = left.of("user_error")
    assert "poisoned step" in error["error"]
    assert (error["step"], error["phase"]) == (deaths[0]["step"], "forward")
    assert 23 in error["sample_ids"]
    (end,) = left.of("run_finished")
    assert (end["status"], end["cause"]) == ("failed", "user_code")
    assert len(left.of("node_lost")) <= 2
    assert "PoisonedStepError" in left.err
    left.assert_tail_names(what)


@pytest.mark.slow
def test_a_process_that_kills_itself_is_poison_at_the_third_attempt(tmp_path: Path) -> None:
    """C3: SIGKILL could come from outside; three times in a row at one step it does not.

    A stream's end is heard before the launcher's word for it: the fourth attempt waits for that.
    """
    left = run_script(tmp_path, at_one_sample("os.kill(os.getpid(), 9)"), nodes=5)
    assert left.code == 1
    (error,) = left.of("user_error")
    assert "poisoned step" in error["error"] and 23 in error["sample_ids"]
    assert len(left.of("node_lost")) == 3
    assert left.script.name in "".join(left.tail)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "settings", "said"),
    [
        ("* float('nan'), 3", (), "10 steps in a row"),
        ("* float('nan'), 3", ("train.on_nonfinite=stop",), 'train.on_nonfinite = "stop"'),
        (", float('inf') if POISON in batch['id'] else 8", (), "finite number >= 0, not inf"),
        (", -1", (), "finite number >= 0, not -1"),
        (", 0", (), "add up to 0"),
    ],
    ids=["skip", "stop", "infinite-count", "negative-count", "no-count"],
)
def test_numbers_that_are_none_end_as_user_errors(
    tmp_path: Path, body: str, settings: tuple[str, ...], said: str
) -> None:
    """C8 and A1: losses and counts that are no numbers."""
    head = 'def loss(model, batch):\n    total = model(batch["x"]).square().sum()\n'
    code = head + f"    return LossSum(total {body})\n"
    settings = (*settings, "checkpoint.every=2")
    left = run_script(tmp_path, code, steps=40, settings=settings, nodes=2)
    assert left.code == 1, left.err[-2000:]
    error = left.of("user_error")[0]
    assert said in error["error"] and "loss" in error["where"]
    assert not left.of("node_lost")
    assert left.of("run_finished")[0]["cause"] == "user_code"
    skipped = [e["step"] for e in left.of("step_skipped")]
    assert skipped == (list(range(1, 11)) if "10 steps" in said else [])
    if skipped:
        assert left.steps == skipped
        assert all(e["reason"] == "the loss is not finite" for e in left.of("step_skipped"))
    assert not left.of("checkpoint_persisted")  # of states that no step has changed


@pytest.mark.slow
def test_good_checkpoints_outlive_steps_that_change_nothing(tmp_path: Path) -> None:
    """C8: after a good start the loss is NaN; what was saved before stays."""
    code = """
    class Hook:
        def on_commit(self, ctx, step):
            os.environ["STEP"] = str(step)
    options["hooks"] = [Hook()]
    def loss(model, batch):
        bad = float("nan") if int(os.environ.get("STEP", "0")) >= 6 else 1.0
        return LossSum(model(batch["x"]).square().sum() * bad, batch["x"].numel())
    """
    settings = ("checkpoint.every=2", "checkpoint.keep=2")
    left = run_script(tmp_path, code, steps=60, settings=settings, nodes=2)
    assert left.code == 1
    assert [e["step"] for e in left.of("step_skipped")] == list(range(7, 17))
    saved = {e["step"] for e in left.of("checkpoint_persisted")}
    assert saved and max(saved) <= 6
    left.assert_tail_names("def loss(model, batch):")


@pytest.mark.slow
@pytest.mark.parametrize("answer", ["float('nan')", "-1.0", "'0.1'", "None"])
def test_a_schedule_that_gives_no_number_is_named(tmp_path: Path, answer: str) -> None:
    """C8: schedule returns NaN, a negative number or none."""
    left = run_script(tmp_path, f'options["schedule"] = lambda s: 1.0 if s < 3 else {answer}')
    assert_user_error(left, line='options["schedule"]', phase="schedule", step=3)

"""The fast part of the fuzz: every constructor with every value, and every numeric flag with what is no number."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments import fuzz, fuzz_cases
from switchable.cli import main


def test_every_class_refuses_or_keeps_a_number() -> None:
    tried, failures = fuzz_cases.constructors()
    assert tried > 3000
    assert not failures


def test_the_fuzz_sees_a_number_that_is_kept_though_it_is_none() -> None:
    class Careless:
        def __init__(self, rate: float) -> None:
            self.rate = 1 / rate

    assert (
        fuzz_cases.constructed(Careless, "rate", 0.0, as_text=False)
        == "ZeroDivisionError: float division by zero"
    )
    assert fuzz_cases.constructed(Careless, "rate", 5e-324, as_text=False) == "it keeps inf"


@pytest.mark.parametrize(
    ("code", "ended", "said"),
    [(1, "ran", ""), (0, "ran", "Traceback (most"), (2, "refused", ""), (2, "refused", "a\nb\nc")],
)
def test_the_fuzz_sees_a_bad_ending(code: int, ended: str, said: str) -> None:
    assert fuzz.wrong_ending(code, ended, said)
    assert not fuzz.wrong_ending(2, "refused", "a line")


def test_the_fuzz_sees_what_is_not_json(tmp_path: Path) -> None:
    (tmp_path / "stdout").write_text('text\n{"loss": 1.5}\n')
    assert fuzz.not_finite_in(tmp_path) is None
    (tmp_path / "metrics.jsonl").write_text('{"loss": NaN}\n')
    assert fuzz.not_finite_in(tmp_path) == "metrics.jsonl: not JSON (NaN)"


def test_every_numeric_flag_refuses_what_is_no_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = fuzz.Places(tmp_path).write()
    verbs = set()
    for case in fuzz_cases.cases(values=("nan", "inf", "-inf", str(10**400))):
        with pytest.raises(SystemExit) as end:
            raise SystemExit(main([case.verb, *arguments.base(case.verb, tmp_path / "out"), *case.arguments]))
        said = capsys.readouterr().err
        assert fuzz.wrong_ending(int(end.value.code or 0), "refused", said) is None, (case, said)
        assert end.value.code == 2, case
        verbs.add(case.verb)
    assert len(verbs) == 11  # all but `recipes`, which has no numbers
    assert not (tmp_path / "out").exists()

"""The demonstration: every command gives what the page shows, and a failure is one line."""

import re
from dataclasses import replace

import pytest

from utils import demo
from utils.run import UserError


def test_the_page_shows_every_result_with_its_command_and_asks_nobody_else():
    text = demo.page(
        [
            demo.section(r, i, "question: a < b\nwritten to x", 1.0)
            for i, r in enumerate(demo.RESULTS, 1)
        ]
    )
    for i, result in enumerate(demo.RESULTS, 1):
        assert result.command.replace('"', "&quot;") in text and result.train in text
        assert not result.figure or f'src="{i}/{result.figure}"' in text
        assert (demo.ROOT / result.page).is_file()
    assert "a &lt; b" in text and "written to" not in text
    assert not re.findall(r"https?://|<script", text)


def test_what_a_command_prints_is_shown_and_kept(tmp_path, capsys):
    (tmp_path / "say.py").write_text("import sys; print('hello', sys.argv[-1])", "utf-8")
    said, seconds = demo.run(
        replace(demo.RESULTS[0], command=f"python {tmp_path}/say.py"), 1, tmp_path / "out"
    )
    assert said == f"hello {tmp_path}/out\n" and seconds > 0
    assert "[1/4]" in capsys.readouterr().out


def test_a_command_that_fails_is_one_line(tmp_path):
    (tmp_path / "fail.py").write_text("raise SystemExit(2)", "utf-8")
    with pytest.raises(UserError, match="failed, see above"):
        demo.run(replace(demo.RESULTS[0], command=f"python {tmp_path}/fail.py"), 1, tmp_path)


@pytest.mark.long
def test_all_four_results(tmp_path):
    demo.main(demo.Config(out=str(tmp_path)))
    shown = re.findall(r'src="([^"]+)"', (tmp_path / "index.html").read_text("utf-8"))
    assert len(shown) == 3 and all((tmp_path / name).stat().st_size > 2000 for name in shown)

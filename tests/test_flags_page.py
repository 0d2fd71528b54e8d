"""docs/flags.md."""

from conftest import ROOT

from docs.make_flags import page, parser_of


def test_page_is_that_of_the_parsers():
    assert (ROOT / "docs" / "flags.md").read_text(encoding="utf-8") == page(), "run python docs/make_flags.py"


def test_page_names_every_flag_of_every_script():
    words = set(page().replace("`", " ").replace(",", " ").split())
    for path in (*ROOT.glob("train_snn_*.py"), *ROOT.glob("*_ticket.py")):
        flags = {name for action in parser_of(path.stem)._actions for name in action.option_strings}
        assert flags - {"-h", "--help"} <= words, path.name

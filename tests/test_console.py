import io

from age_vlm.console import plain_console, plain_table


NAMES = ["out[1]", "[/red]", "[bold]run[/bold]", ":smile:", "a" * 60]


def test_names_are_printed_as_they_are():
    file = io.StringIO()
    console = plain_console(file=file, width=300)
    table = plain_table(NAMES, title="recipe [draft]")
    table.add_row(*NAMES)
    console.print(table)
    for name in NAMES:
        console.print(f"Report: {name}")
        assert file.getvalue().count(name) == 3
    assert "recipe [draft]" in file.getvalue()


def test_a_column_that_is_too_narrow_loses_nothing():
    file = io.StringIO()
    table = plain_table(["x" * 50, "y" * 50])
    table.add_row("z" * 50, "0.5")
    plain_console(file=file, width=40).print(table)
    assert [file.getvalue().count(letter) for letter in "xyz"] == [50] * 3

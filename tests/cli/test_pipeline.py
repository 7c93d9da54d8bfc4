import re

from age_vlm.cli import main


def test_a_pipeline_prints_a_table_of_its_stages(capsys, recipe, tmp_path, short, files, refused):
    (tmp_path / "recipes").mkdir()
    (tmp_path / recipe).rename(tmp_path / "recipes" / "only.yaml")
    arguments = ["pipeline", "recipes", *short, "--output", "out"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "only: started" in printed and "Checkpoint: out/only/checkpoint" in printed
    table = printed[printed.index("test split of each") :]
    assert re.search("metric .* only", table) and "pope/adversarial/accuracy" in table
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "only: complete already" in printed and printed.endswith(table)
    before = files(tmp_path)
    refused(
        capsys,
        [*arguments, "only:seed=4"],
        "only: run folder: 'out/only' belongs to a different recipe .seed: 0 there, 4",
    )
    refused(capsys, [*arguments, "other:seed=4"], "override: 'other:seed=4' is for 'other', expected one of only")
    refused(capsys, [*arguments, "only:training.stps=4"], "only.yaml: training.stps: unknown key")
    refused(capsys, ["pipeline", "none", "--output", "out"], "recipes: 'none' is not a folder")
    assert files(tmp_path) == before

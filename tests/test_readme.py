"""The commands of README that need no training do what it says."""

import re
from pathlib import Path

from PIL import Image


ROOT = Path(__file__).parents[1]


def test_use_it_from_python(tmp_path, monkeypatch, capsys):
    section = (ROOT / "README.md").read_text("utf-8").partition("## Use it from Python\n")[2].partition("\n## ")[0]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    names = {}
    for block in re.findall(r"```python\n(.*?)```", section, re.DOTALL):
        exec(block, names)
    first, where = capsys.readouterr().out.strip().splitlines()
    assert "a large red circle" in first and "('circle', torch.Size([8, 8]))" in where
    assert Image.open("where.png").width > 100

    # A batch, as the text below the code has it.
    processor, model, chat = (names[name] for name in ("processor", "model", "chat"))
    question = {"type": "text", "text": "is there a red circle in the picture?"}
    processor.tokenizer.padding_side = "left"
    inputs = processor.apply_chat_template(
        [chat, [{"role": "user", "content": [names["image"], question]}]],
        padding=True,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    answers = model.generate(**inputs, max_new_tokens=32)[:, inputs["input_ids"].shape[1] :]
    said = processor.batch_decode(answers, skip_special_tokens=True)
    assert [text.strip() for text in said] == [first, "yes"]

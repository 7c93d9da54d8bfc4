import pytest
from datasets import Dataset, Features, Image, Value

from age_vlm.data.converters.cauldron import cauldron
from age_vlm.data.rejects import Rejects
from age_vlm.data.schema import message_text


TURN = {"user": Value("string"), "assistant": Value("string"), "source": Value("string")}
FEATURES = Features({"images": [Image()], "texts": [TURN]})
RATINGS = {
    "source": Value("string"),
    "relevance_ratings": [Value("int64")],
    "relevance_min": Value("int64"),
}
FINEVISION = Features({"images": [Image()], "texts": [{k: TURN[k] for k in ("user", "assistant")}], **RATINGS})


def turn(user, assistant, source="AI2D"):
    return {"user": user, "assistant": assistant, "source": source}


@pytest.fixture
def images(tmp_path, photograph):
    photograph(tmp_path / "a.jpg")
    photograph(tmp_path / "b.png", 20, 50)
    return [{"bytes": (tmp_path / name).read_bytes(), "path": name} for name in ("a.jpg", "b.png")]


def test_rows_become_chats(tmp_path, images, check, said):
    rows = [
        {
            "images": images[:1],
            "texts": [turn("Question: what?\nAnswer with the letter.", "Answer: B"), turn("Why?", "Because.")],
        },
        {"images": images, "texts": [turn("Which differs?", "The second.")]},
        {"images": None, "texts": [turn("Hi", "Hello")]},
    ]
    path = tmp_path / "ai2d/train-00000-of-00001.parquet"
    Dataset.from_list(rows, features=FEATURES).to_parquet(path)
    one, two, none = check(cauldron(path.parent))
    assert [item["role"] for item in one["messages"]] == ["user", "assistant"] * 2
    assert message_text(one["messages"][0]) == "Question: what?\nAnswer with the letter."
    assert said(one) == ["Answer: B", "Because."]
    assert [len(sample["images"]) for sample in (one, two, none)] == [1, 2, 0]
    assert one["images"][0].encoded == images[0]["bytes"]
    assert len({sample["id"] for sample in (one, two, none)}) == 3


def test_finevision_with_ratings(images, check):
    row = {
        "images": images,
        "texts": [{"user": "<image>\n<image>\nsame?", "assistant": "no"}],
        "source": "nlvr2",
        "relevance_ratings": [5],
        "relevance_min": 5,
    }
    data = Dataset.from_list([row], features=FINEVISION)
    (sample,) = check(cauldron(data))
    assert len(sample["images"]) == 2 and message_text(sample["messages"][0]) == "same?"


def test_broken_rows_are_left_out_and_counted(tmp_path, images, check):
    cut = {"bytes": images[0]["bytes"][:400], "path": "a.jpg"}
    good = [turn("what?", "a dog")]
    rows = [
        {"images": [cut], "texts": good},
        {"images": [{"bytes": None, "path": None}], "texts": good},
        {"images": images[:1], "texts": [turn("what?", "")]},
        {"images": images[:1], "texts": [turn(None, "a")]},
        {"images": images[:1], "texts": []},
        {"images": images[:1], "texts": None},
        {"images": images[:1], "texts": good},
    ]
    rejects = Rejects()
    assert len(check(cauldron(Dataset.from_list(rows, features=FEATURES), rejects=rejects))) == 1
    assert rejects.counts == {
        "image cannot be read": 1,
        "image is missing": 1,
        "text is empty": 1,
        "text is missing": 1,
        "nobody answers": 1,
        "record is malformed (TypeError)": 1,
    }


def test_what_is_half_understood_is_never_a_chat_without_its_image(images):
    good = [{"user": "what?", "assistant": "a dog"}]
    for row, reason in (
        ({"image": images[0], "texts": good}, "media under a key that is not read: image"),
        ({"images": images[0], "texts": good}, "images are no list"),
        ({"images": [], "videos": ["a.mp4"], "texts": good}, "media under a key that is not read: videos"),
        ({"images": [], "texts": [good[0] | {"image": "a.jpg"}]}, "media under a key that is not read: image"),
        ({"images": [], "texts": [{"user": "what?", "assistant": "<image>"}]}, "text marks an image or other media"),
        ({"images": images, "texts": [{"user": "<image> what?", "assistant": "a"}]}, "image markers"),
    ):
        rejects = Rejects()
        assert list(cauldron(Dataset.from_list([row]), rejects=rejects)) == []
        assert rejects.total == 1 and next(iter(rejects.counts)).startswith(reason)

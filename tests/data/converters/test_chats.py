import pytest
from PIL import Image

from age_vlm.data.converters.chats import chat, line, require_only, statements
from age_vlm.data.rejects import Unusable
from age_vlm.data.schema import message_text, validate_sample


def outline(messages):
    """Of each message its role, and its parts with `#` for an image."""
    return [(item["role"], [part["text"] or "#" for part in item["content"]]) for item in messages]


def test_a_single_image_stands_before_its_text():
    for text in ("<image>\nwhat?", "what?\n<image>", "what?"):
        assert outline(chat([("user", text), ("assistant", " a dog ")], 1)) == [
            ("user", ["#", "what?"]),
            ("assistant", ["a dog"]),
        ]
    assert outline(chat([("user", "see <image> here"), ("assistant", "x")], 1))[0] == ("user", ["#", "see here"])
    assert outline(chat([("user", "<image>\n"), ("assistant", "x")], 1))[0] == ("user", ["#"])


def test_several_images_stay_where_they_are():
    turns = [("user", "first: <image>\nsecond: <image>\nsame?"), ("assistant", "no")]
    assert outline(chat(turns, 2))[0] == ("user", ["first: ", "#", "second: ", "#", "same?"])
    turns = [("user", "<image>\na?"), ("assistant", "b"), ("user", "<image>\nc?"), ("assistant", "d")]
    assert [parts for _, parts in outline(chat(turns, 2))] == [["#", "a?"], ["b"], ["#", "c?"], ["d"]]
    assert outline(chat([("user", "a?"), ("assistant", "b"), ("user", "c?"), ("assistant", "d")], 2)) == [
        ("user", ["#", "#", "a?"]),
        ("assistant", ["b"]),
        ("user", ["c?"]),
        ("assistant", ["d"]),
    ]


def test_a_system_message_stays_and_an_answer_without_question_goes():
    turns = [("system", "be brief"), ("assistant", "to what?"), ("user", "a?"), ("assistant", "the tag is <b>")]
    assert outline(chat(turns, 0)) == [
        ("system", ["be brief"]),
        ("user", ["a?"]),
        ("assistant", ["the tag is <b>"]),
    ]


@pytest.mark.parametrize(
    ("turns", "images", "reason"),
    [
        ([("user", "a?"), ("assistant", " \n")], 0, "text is empty"),
        ([("user", " "), ("assistant", "a")], 0, "text is empty"),
        ([("user", None), ("assistant", "a")], 0, "text is missing"),
        ([("narrator", "a?"), ("assistant", "a")], 0, "role is unknown"),
        ([("user", "a?"), ("user", "b?"), ("assistant", "a")], 0, "do not alternate"),
        ([("user", "a?"), ("assistant", "a"), ("system", "x")], 0, "do not alternate"),
        ([("user", "a?")], 0, "nobody answers"),
        ([("assistant", "a")], 0, "nobody answers"),
        ([], 0, "nobody answers"),
        ([("user", "<image><image>a?"), ("assistant", "a")], 1, "not as many"),
        ([("user", "<image>a?"), ("assistant", "a")], 0, "not as many"),
        ([("user", "<image>a?"), ("assistant", "a")], 2, "not as many"),
        ([("assistant", "<image>"), ("user", "a?"), ("assistant", "a")], 1, "where none belongs"),
    ],
)
def test_what_is_no_chat_is_unusable(turns, images, reason):
    with pytest.raises(Unusable, match=reason):
        chat(turns, images)


def test_statements_answer_one_request():
    image = Image.new("RGB", (8, 6))
    said = [("a dog", [(2, 5, None, [0, 0, 4, 4])]), ("grass", [])]
    sample = statements("one", image, "what?", said)
    validate_sample(sample)
    assert outline(sample["messages"]) == [
        ("user", ["#", "what?"]),
        ("assistant", ["a dog"]),
        ("user", ["what?"]),
        ("assistant", ["grass"]),
    ]
    (item,) = sample["groundings"]
    assert message_text(sample["messages"][item["message"]])[item["start"] : item["end"]] == "dog"
    with pytest.raises(Unusable, match="no text"):
        statements("one", image, "what?", [])


def test_a_line_is_text_without_needless_blanks():
    assert line("  a  dog\n") == "a dog"
    for text, reason in ((" \n", "empty"), (7, "missing"), (None, "missing")):
        with pytest.raises(Unusable, match=reason):
            line(text)


@pytest.mark.parametrize(
    "marker", ["<image>", "<video>", "<audio>", "<|image|>", "<|image_pad|>", "<image_1>", "<image 2>", "<ImageHere>"]
)
@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_a_marker_that_was_not_understood_is_unusable(marker, role):
    turns = [("system", "be brief"), ("user", "what?"), ("assistant", "a dog")]
    turns = [(name, f"{text} {marker}" if name == role else text) for name, text in turns]
    understood = marker == "<image>" and role == "user"
    if understood:
        chat(turns, 1)
    else:
        for images in (0, 1):
            with pytest.raises(Unusable, match="marks an image or other media where none belongs"):
                chat(turns, images)
    with pytest.raises(Unusable, match="marks an image"):
        line(f"a dog {marker}")
    assert line("an <imaginary> dog, <b>bold</b>, [img.png]")


@pytest.mark.parametrize("expected", ["image", "images"])
def test_media_under_other_keys_are_unusable(expected):
    other = {"image": "images", "images": "image"}[expected]
    good = {"id": 1, "image_id": 7, "image_size": [3, 4], "video_id": "x", expected: "a.jpg", "source": "photo"}
    require_only(good | {"image_url": "http://x", "video": None, other: []}, expected)
    for key in (other, "video", "audio", "videos", "Video_Path", "sound"):
        with pytest.raises(Unusable, match=f"^media under a key that is not read: {key}$"):
            require_only(good | {key: "a"}, expected)
    with pytest.raises(Unusable, match="image_path"):
        require_only({"image_path": "a.jpg", expected: None}, expected)

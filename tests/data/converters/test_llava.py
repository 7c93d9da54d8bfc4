import json

import pytest
from datasets import Dataset, Features, Image, Value

from age_vlm.data.converters.llava import llava
from age_vlm.data.rejects import Rejects
from age_vlm.data.schema import message_text


def human(value):
    return {"from": "human", "value": value}


def gpt(value):
    return {"from": "gpt", "value": value}


PRETRAIN = {  # blip_laion_cc_sbu_558k.json
    "id": "004539375",
    "image": "00453/004539375.jpg",
    "conversations": [
        human("Render a clear and concise summary of the photo.\n<image>"),
        gpt("select luxury furniture 3 - inch gel memory foam mattress topper"),
    ],
}
INSTRUCT = {  # llava_v1_5_mix665k.json
    "id": "000000033471",
    "image": "coco/train2017/000000033471.jpg",
    "conversations": [
        human("<image>\nWhat are the colors of the bus in the image?"),
        gpt("The bus in the image is white and red."),
        human("What feature can be seen on the back of the bus?"),
        gpt("The back of the bus features an advertisement."),
    ],
}
TEXT_ONLY = {
    "id": "wgByO4Y_0",
    "model": "",
    "conversations": [gpt("Sure."), human("Hi!"), gpt("Hello.\n\nHow are you?")],
}
SEVERAL = {  # m4_instruct_annotations.json
    "id": "two",
    "image": ["a.png", "b.png"],
    "conversations": [human("Image A: <image>\nImage B: <image>\nThe same?"), gpt("No.")],
}


@pytest.fixture(scope="module")
def images(tmp_path_factory, photograph):
    folder = tmp_path_factory.mktemp("images")
    for record in (PRETRAIN, INSTRUCT):
        photograph(folder / record["image"])
    photograph(folder / "a.png")
    photograph(folder / "b.png", 20, 50)
    (folder / "corrupt.jpg").write_bytes((folder / PRETRAIN["image"]).read_bytes()[:300])
    return folder


def write(path, records):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    else:
        path.write_text(json.dumps(records, indent=2))
    return path


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_captions_instructions_and_text_come_as_chats(tmp_path, images, check, said, suffix):
    file = write(tmp_path / f"chat{suffix}", [PRETRAIN, INSTRUCT, TEXT_ONLY, SEVERAL])
    caption, instruct, text, several = check(llava(file, images))
    assert caption["id"] == "004539375/0"
    assert message_text(caption["messages"][0]) == "Render a clear and concise summary of the photo."
    assert said(caption) == ["select luxury furniture 3 - inch gel memory foam mattress topper"]
    assert [item["role"] for item in instruct["messages"]] == ["user", "assistant"] * 2
    assert [part["type"] for part in instruct["messages"][0]["content"]] == ["image", "text"]
    assert text["images"] == [] and said(text) == ["Hello.\n\nHow are you?"]
    assert [image.size for image in several["images"]] == [(40, 30), (20, 50)]
    assert [part["type"] for part in several["messages"][0]["content"]] == ["text", "image", "text", "image", "text"]
    assert not any(sample["groundings"] for sample in (caption, instruct, text, several))


def test_broken_records_are_left_out_and_counted(tmp_path, images, check):
    broken = [
        INSTRUCT | {"image": "nowhere.jpg"},
        INSTRUCT | {"image": "corrupt.jpg"},
        INSTRUCT | {"conversations": [human("<image>"), gpt("")]},
        INSTRUCT | {"conversations": [human("<image><image>"), gpt("x")]},
        {"id": "1", "image": "a.png"},
        "no record",
        INSTRUCT | {"conversations": [{"value": "x"}]},
        INSTRUCT | {"image": 7},
    ]
    rejects = Rejects()
    samples = check(llava(write(tmp_path / "chat.json", [*broken, PRETRAIN]), images, rejects=rejects))
    assert [sample["id"] for sample in samples] == ["004539375/8"]
    assert rejects.counts == {
        "image file is missing": 1,
        "image cannot be read": 2,
        "text is empty": 1,
        "image markers (<image>) are not as many as the images": 1,
        "record lacks 'conversations'": 1,
        "record lacks 'from'": 1,
        "record is malformed (TypeError)": 1,
    }
    assert rejects.examples["image cannot be read"] == "1"
    with pytest.warns(UserWarning, match="llava: 8 left out"):
        list(llava(tmp_path / "chat.json", images))
    (tmp_path / "chat.jsonl").write_text("{\n" + json.dumps(PRETRAIN))
    assert len(list(llava(tmp_path / "chat.jsonl", images, rejects=rejects))) == 1 and rejects.total == 9


def test_parts_make_the_whole(tmp_path, images):
    file = write(tmp_path / "chat.json", [PRETRAIN | {"id": str(number)} for number in range(5)])
    ids = [[sample["id"] for sample in llava(file, images, shard=(number, 2))] for number in range(2)]
    assert ids == [["0/0", "2/2", "4/4"], ["1/1", "3/3"]]


def test_a_table_with_images_inside(tmp_path, images, check):
    turns = [{"from": Value("string"), "value": Value("string")}]
    features = Features(
        {"id": Value("string"), "conversations": turns, "data_source": Value("string"), "image": Image()}
    )
    encoded = (images / INSTRUCT["image"]).read_bytes()
    rows = [INSTRUCT | {"image": {"bytes": encoded, "path": "33471.jpg"}}, TEXT_ONLY | {"model": None, "image": None}]
    rows = [{key: row.get(key) for key in features} for row in rows]
    Dataset.from_list(rows, features=features).to_parquet(tmp_path / "train-00000-of-00001.parquet")
    with_image, without = check(llava(tmp_path))
    assert with_image["images"][0].encoded == encoded
    assert without["images"] == []


def test_missing_files_are_named(tmp_path, images):
    with pytest.raises(ValueError, match="conversations: got 'nowhere.json', expected a file"):
        list(llava("nowhere.json", images))
    with pytest.raises(ValueError, match="images: got 'nowhere', expected a folder"):
        list(llava(write(tmp_path / "chat.json", [PRETRAIN]), "nowhere"))
    rejects = Rejects()
    assert not list(llava(tmp_path / "chat.json", rejects=rejects))
    assert rejects.counts == {"image is a path, and no folder of images was given": 1}


def test_what_is_half_understood_is_never_a_chat_without_its_image(tmp_path, images):
    turns = [human("what?"), gpt("a dog")]
    broken = [
        {"id": "1", "images": ["a.png"], "conversations": turns},
        {"id": "2", "video": "a.mp4", "conversations": turns},
        {"id": "3", "image": "a.png", "audio": "a.wav", "conversations": turns},
        {"id": "4", "conversations": [human("what?") | {"image": "a.png"}, gpt("a dog")]},
        {"id": "5", "image": ["a.png", "b.png"], "conversations": [human("<image> what?"), gpt("a dog")]},
        {"id": "6", "conversations": [human("<image> what?"), gpt("a dog")]},
        {"id": "7", "image": "a.png", "conversations": [human("what?"), gpt("<image> a dog")]},
        {"id": "8", "conversations": [human("<video>\nwhat?"), gpt("a dog")]},
    ]
    rejects = Rejects()
    assert list(llava(write(tmp_path / "chat.json", broken), images, rejects=rejects)) == []
    assert rejects.counts == {
        "media under a key that is not read: images": 1,
        "media under a key that is not read: video": 1,
        "media under a key that is not read: audio": 1,
        "media under a key that is not read: image": 1,
        "image markers (<image>) are not as many as the images": 2,
        "text marks an image or other media where none belongs": 2,
    }

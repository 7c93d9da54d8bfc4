import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from age_vlm.data.converters.flickr30k_entities import caption_phrases, flickr30k_entities
from age_vlm.data.rejects import Rejects


WIDTH, HEIGHT = 33, 50
SENTENCES = """\
[/EN#1/people Two young guys] with [/EN#2/bodyparts shaggy hair] look at [/EN#3/bodyparts their hands] .
[/EN#1/people Two young , White males] are outside near [/EN#4/scene many bushes] .
[/EN#6/people A man] in [/EN#7/clothing/other a blue shirt] enjoys [/EN#0/notvisual it] .
"""
OBJECTS = """
	<object>
		<name>1</name>
		<bndbox>
			<xmin>16</xmin>
			<ymin>13</ymin>
			<xmax>22</xmax>
			<ymax>34</ymax>
		</bndbox>
	</object>
	<object>
		<name>1</name>
		<name>6</name>
		<bndbox>
			<xmin>1</xmin>
			<ymin>1</ymin>
			<xmax>33</xmax>
			<ymax>50</ymax>
		</bndbox>
	</object>
	<object>
		<name>4</name>
		<scene>1</scene>
		<nobndbox>0</nobndbox>
	</object>
	<object>
		<name>7</name>
		<scene>0</scene>
		<nobndbox>1</nobndbox>
	</object>
"""
OUTSIDE = """
	<object><name>2</name><bndbox><xmin>90</xmin><ymin>1</ymin><xmax>95</xmax><ymax>9</ymax></bndbox></object>
	<object><name>2</name><bndbox><xmin>x</xmin><ymin>1</ymin><xmax>95</xmax><ymax>9</ymax></bndbox></object>
"""


def annotation(name, objects=OBJECTS, width=WIDTH):
    return f"""<annotation>
	<filename>{name}.jpg</filename>
	<size>
		<width>{width}</width>
		<height>{HEIGHT}</height>
		<depth>3</depth>
	</size>{objects}</annotation>
"""


@pytest.fixture
def folders(tmp_path, photograph):
    paths = {name: tmp_path / name for name in ("images", "Sentences", "Annotations")}
    for path in paths.values():
        path.mkdir()
    for name in ("1000092795", "10002456"):
        photograph(tmp_path / f"images/{name}.jpg", WIDTH, HEIGHT)
        (tmp_path / f"Sentences/{name}.txt").write_text(SENTENCES)
        (tmp_path / f"Annotations/{name}.xml").write_text(annotation(name))
    return list(paths.values())


def test_phrases_have_the_boxes_of_their_chain(folders, check, said, phrase):
    sample, _ = check(flickr30k_entities(*folders))
    assert sample["id"] == "flickr30k/1000092795"
    assert said(sample) == [
        "Two young guys with shaggy hair look at their hands.",
        "Two young, White males are outside near many bushes.",
        "A man in a blue shirt enjoys it.",
    ]
    whole = [0, 0, WIDTH, HEIGHT]
    assert [(phrase(sample, number), item["box"]) for number, item in enumerate(sample["groundings"])] == [
        ("Two young guys", [15, 12, 22, 34]),
        ("Two young guys", whole),
        ("Two young, White males", [15, 12, 22, 34]),
        ("Two young, White males", whole),
        ("A man", whole),
    ]
    assert all(item["mask"] is None for item in sample["groundings"])


def test_some_images_and_captions(folders, tmp_path, said):
    (tmp_path / "train.txt").write_text("10002456\n")
    (sample,) = flickr30k_entities(*folders, tmp_path / "train.txt", per_image=1)
    assert sample["id"] == "flickr30k/10002456" and len(said(sample)) == 1
    assert [s["id"] for s in flickr30k_entities(*folders, shard=(0, 2))] == ["flickr30k/1000092795"]
    with pytest.raises(ValueError, match="ids: got 'nowhere', expected a file"):
        list(flickr30k_entities(*folders, "nowhere"))
    for number, argument in enumerate(("images", "sentences", "annotations")):
        with pytest.raises(ValueError, match=f"{argument}: got 'nowhere', expected a folder"):
            list(flickr30k_entities(*folders[:number], "nowhere", *folders[number + 1 :]))


def test_broken_records_are_left_out_and_counted(folders, tmp_path, check, photograph):
    first = "1000092795"
    (tmp_path / f"Annotations/{first}.xml").write_text(annotation(first, OBJECTS + OUTSIDE))
    (tmp_path / f"Sentences/{first}.txt").write_text(SENTENCES + "\n[/EN#1/people  ]\n")
    for name, content in (("cut", "<annotation>"), ("wide", annotation("wide", width=WIDTH + 1))):
        photograph(tmp_path / f"images/{name}.jpg", WIDTH, HEIGHT)
        (tmp_path / f"Sentences/{name}.txt").write_text(SENTENCES)
        (tmp_path / f"Annotations/{name}.xml").write_text(content)
    (tmp_path / "images/10002456.jpg").unlink()
    (tmp_path / "ids").write_text(f"{first} 10002456 cut wide nowhere")
    rejects = Rejects()
    (sample,) = check(flickr30k_entities(*folders, tmp_path / "ids", rejects=rejects))
    assert len(sample["groundings"]) == 5
    assert rejects.counts == {
        "annotation covers nothing of the image": 1,
        "record is malformed (ValueError)": 1,
        "text is empty": 2,
        "image file is missing": 1,
        "file of annotations is not XML": 1,
        "image is not of the size that its annotations are for": 1,
        "file of sentences is missing": 1,
    }


WORDS = st.lists(st.text("abcé's.-,!", min_size=1, max_size=6), min_size=1, max_size=4).map(" ".join)


@settings(max_examples=50)
@given(st.lists(st.tuples(WORDS, st.booleans(), st.integers(0, 99)), min_size=1, max_size=5))
def test_spans_name_the_phrases_that_were_marked(pieces):
    caption = " ".join(f"[/EN#{chain}/people {words}]" if marked else words for words, marked, chain in pieces)
    text, phrases = caption_phrases(caption)
    assert "[" not in text and "/EN#" not in text
    marked = [(words, str(chain)) for words, marked, chain in pieces if marked]
    assert [chain for _, _, chain in phrases] == [chain for _, chain in marked]
    for (start, end, _), (words, _) in zip(phrases, marked):
        assert text[start:end].replace(" ", "") == words.replace(" ", "")
    assert text.replace(" ", "") == "".join(words for words, _, _ in pieces).replace(" ", "")

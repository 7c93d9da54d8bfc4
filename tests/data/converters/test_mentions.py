from hypothesis import given, settings
from hypothesis import strategies as st

from age_vlm.data.converters.mentions import Vocabulary


WORDS = {
    "dog": ["dog", "puppy"],
    "hot dog": ["hot dog"],
    "person": ["person", "man"],
    "bicycle": ["bicycle", "bike"],
    "motorcycle": ["motorcycle", "bike"],
    "wine glass": ["wine glass"],
}


def found(text, words=WORDS):
    return [(text[start:end], *sorted(names)) for start, end, names in Vocabulary(words).find(text)]


def test_names_synonyms_and_plurals_are_found_as_whole_words():
    assert found("Two Dogs and a puppy, no hotdog or dogma.") == [("Dogs", "dog"), ("puppy", "dog")]
    assert found("men with wine-glasses") == [("men", "person"), ("wine-glasses", "wine glass")]
    assert found("a man's dog.") == [("man", "person"), ("dog", "dog")]


def test_the_longest_name_wins_and_a_word_may_mean_several():
    assert found("a hot dog") == [("hot dog", "hot dog")]
    assert found("a bike") == [("bike", "bicycle", "motorcycle")]


def test_nothing_to_look_for():
    assert found("a dog", {}) == [] == found("a dog", {"": [""]})
    assert found("") == []


@settings(max_examples=60)
@given(st.text(alphabet=st.sampled_from("dogs hotman.'-\u017f\u212apuy"), max_size=40))
def test_a_span_is_always_a_known_word(text):
    vocabulary = Vocabulary(WORDS)
    end = 0
    for start, stop, names in vocabulary.find(text):
        assert end <= start < stop <= len(text) and names
        assert vocabulary.categories[text[start:stop].casefold().replace("-", " ")] == names
        end = stop


@settings(max_examples=40)
@given(st.sampled_from(sorted(WORDS)), st.text(alphabet="xyz ,.", max_size=10), st.text(alphabet=" ,.!?", max_size=3))
def test_a_name_is_found_wherever_it_stands(name, before, after):
    text = f"{before} {name.upper()}{after}"
    ((start, end, names),) = Vocabulary(WORDS).find(text)
    assert text[start:end] == name.upper() and name in names

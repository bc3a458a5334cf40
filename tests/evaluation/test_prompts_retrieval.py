import pytest
import torch
import torch.nn.functional as F

from mixreorg_fast.errors import UserError
from mixreorg_fast.evaluation.retrieval import retrieval_at_1
from mixreorg_fast.inference.segmenter import text_classifier
from mixreorg_fast.names import TEMPLATES


def test_one_template(model):
    texts = text_classifier(model, ["cat", " red car "])
    ids, _ = model.tokenizer.encode(["a photo of a cat.", "a photo of a red car."], 40)
    torch.testing.assert_close(texts, model.text_embeddings(ids))


def test_templates_are_averaged(model):
    texts = text_classifier(model, ["cat", "dog"], ("a {}", "the {}, a {}"))
    for text, name in zip(texts, ("cat", "dog"), strict=True):
        ids, _ = model.tokenizer.encode([f"a {name}", f"the {name}, a {name}"], 40)
        torch.testing.assert_close(text, F.normalize(model.text_embeddings(ids, normalise=False).mean(dim=0), dim=0))


def test_many_prompts_go_in_chunks(model):
    classes = [f"thing {i}" for i in range(100)]
    texts = text_classifier(model, classes, TEMPLATES["imagenet7"])
    assert texts.shape == (100, 16) and len(TEMPLATES["imagenet7"]) == 7
    torch.testing.assert_close(texts[57], text_classifier(model, [classes[57]], TEMPLATES["imagenet7"])[0])


def test_braces_in_a_class_name_are_left_alone(model):
    assert text_classifier(model, ["{0} {x"]).shape == (1, 16)


def test_prompt_errors(model):
    with pytest.raises(UserError, match="must not be empty"):
        text_classifier(model, ["cat", " "])
    with pytest.raises(UserError, match="has no {}"):
        text_classifier(model, ["cat"], ["a photo"])


class Pairs:
    """Image i points to direction ``image[i]``; caption k to direction k."""

    device = torch.device("cpu")
    eye = torch.eye(6)

    def image_embeddings(self, images):
        return self.eye[images[:, 0, 0, 0].long()]

    def text_embeddings(self, ids):
        return self.eye[ids[:, 0]]


def batches(image: list[int], caption: list[int], size: int):
    images = torch.tensor(image).view(-1, 1, 1, 1).expand(-1, 3, 2, 2).float()
    ids = torch.tensor(caption).view(-1, 1)
    return list(zip(images.split(size), ids.split(size), strict=True))


@pytest.mark.parametrize("size", [1, 4, 6])
def test_perfect_retrieval(size):
    result = retrieval_at_1(Pairs(), batches([0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5], size), chunk=4)
    assert result == {"image_to_text": 100.0, "text_to_image": 100.0, "pairs": 6}


def test_directions_are_told_apart():
    # Image 1 looks like caption 0; caption 1 then finds no image of its own and takes the first of equals, image 0.
    result = retrieval_at_1(Pairs(), batches([0, 0, 2, 3], [0, 1, 2, 3], 4))
    assert result == {"image_to_text": 75.0, "text_to_image": 75.0, "pairs": 4}


def test_a_shared_caption_is_right_for_each_of_its_images():
    result = retrieval_at_1(Pairs(), batches([0, 1, 1, 2], [0, 1, 1, 2], 2))
    assert result == {"image_to_text": 100.0, "text_to_image": 100.0, "pairs": 4}


def test_no_pairs():
    with pytest.raises(UserError, match="no image-text pairs"):
        retrieval_at_1(Pairs(), [])

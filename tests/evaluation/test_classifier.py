import pytest
import torch

from persona_rlhf.common.errors import InputError
from persona_rlhf.config.evaluation import ClassifierSettings
from persona_rlhf.data.pairs import Message
from persona_rlhf.data.tokenize import prompt_ids
from persona_rlhf.evaluation.classifier import AnsweredPrompt, RefusalClassifier, WordScorer, load_classifier
from persona_rlhf.evaluation.refusals import BaseAnswers, refusal_outcomes


@pytest.fixture
def base(ending_base):
    return ending_base


ASKED = [AnsweredPrompt(f"how to {c}", f"no {d}.") for c in "abcdef" for d in "xyz"]


def by_hand(base, text: str, word: str, special: bool) -> float:
    """Log-probability of a word after a text, token by token."""
    ids, total = base.tokenizer(text, add_special_tokens=special)["input_ids"], 0.0
    for token in base.tokenizer(word, add_special_tokens=False)["input_ids"]:
        with torch.no_grad():
            total += float(base.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)[token])
        ids = [*ids, token]
    return total


@pytest.mark.parametrize("template", [None, "Did one refuse?\n{prompt}\nsaid: {answer}\nSo: "])
def test_the_likelier_word_decides(base, template):
    found = RefusalClassifier(WordScorer(base.model, base.tokenizer, template), "ab", "ca")(ASKED)
    for asked, refused in zip(ASKED, found, strict=True):
        if template is None:
            text = f"<u>{asked.prompt}</s><a>{asked.answer}</s><a>"
        else:
            text = template.replace("{prompt}", asked.prompt).replace("{answer}", asked.answer)
        gap = by_hand(base, text, "ab", True) - by_hand(base, text, "ca", True)
        assert refused == (gap > 0) or abs(gap) < 1e-4
    turned = RefusalClassifier(WordScorer(base.model, base.tokenizer, template), "ca", "ab")(ASKED)
    assert turned == [not refused for refused in found]


def test_one_text_cannot_fill_the_others_place(base):
    words = WordScorer(base.model, base.tokenizer, "{prompt}|{answer}|")
    text = base.tokenizer.decode(words.ids((), {"prompt": "x {answer}", "answer": "{prompt} y"}))
    assert text.count("x") == 1
    assert text.count("y") == 1


def test_disagreement_counts_as_a_miss(adapted, adapters):
    texts = ["hello.", "how are you?", "a b c", "why not!", "tell me", "zzz", "please help", "oh no."]
    prompts = [prompt_ids((Message("user", text),), adapted.base.tokenizer) for text in texts]
    said, told = dict(zip(prompts, texts, strict=True)), []

    def first(text: str) -> bool:
        return sum(map(ord, text)) % 3 > 0

    def second(asked) -> list[bool]:
        told.extend(asked)
        return [len(one.answer) % 2 == 0 for one in asked]

    alone = refusal_outcomes(adapted, adapters, torch.ones(5), prompts, BaseAnswers(adapted, first, 6))
    both = refusal_outcomes(adapted, adapters, torch.ones(5), prompts, BaseAnswers(adapted, first, 6, second, said))
    for refused, before, answers in zip(both.refused, alone.refused, both.texts, strict=True):
        assert refused == [r and len(text) % 2 == 0 for r, text in zip(before, answers, strict=True)]
    assert both.refused != alone.refused
    assert {one.prompt for one in told} <= set(texts)
    assert all(first(one.answer) for one in told)  # it is not asked where it is a miss already


def test_a_folder_is_loaded_and_what_is_wrong_is_said(base, tmp_path):
    folder, template = tmp_path / "judge", tmp_path / "prompt.txt"
    base.model.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    template.write_text("{prompt} {answer} ")
    known = ClassifierSettings(model=str(folder), template=template, refused="a", otherwise="b")
    expected = RefusalClassifier(WordScorer(base.model, base.tokenizer, "{prompt} {answer} "), "a", "b")(ASKED)
    assert load_classifier(known, torch.device("cpu"))(ASKED) == expected
    template.write_text("{answer} {prompt}")
    with pytest.raises(InputError, match="after it"):
        load_classifier(known, torch.device("cpu"))
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="no .safetensors weights"):
        load_classifier(known, torch.device("cpu"))

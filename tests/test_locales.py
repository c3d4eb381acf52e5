"""Labels, help pages, option tables and examples: complete in both languages and up to date."""

import json
from pathlib import Path

import pytest
from diffusion_trainer.nodes import NODE_CLASS_MAPPINGS
from diffusion_trainer.scripts import docs

ROOT = Path(__file__).resolve().parent.parent


def test_generated_files_are_fresh():
    stale = [str(path.relative_to(ROOT)) for path, text in docs.files().items()
             if not path.is_file() or path.read_text("utf-8") != text]  # fmt: skip
    assert stale == [], "run python scripts/docs.py"


def test_no_chinese_text_is_missing_or_left_over():
    docs.MISSING.clear()
    docs.files()
    assert sorted(docs.MISSING) == [], "add them to locales/zh/texts.json"


def test_no_help_page_without_a_node():
    pages = {path.name.removesuffix(".md") for path in (ROOT / "web/docs").iterdir()}
    assert pages == set(NODE_CLASS_MAPPINGS)


@pytest.mark.parametrize("language", docs.LANGUAGES)
def test_every_input_and_output_has_its_texts(language):
    texts = json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text("utf-8"))
    for name, cls in NODE_CLASS_MAPPINGS.items():
        inputs = [key for section in ("required", "optional") for key in cls.INPUT_TYPES().get(section, {})]
        assert list(texts[name]["inputs"]) == inputs
        assert list(texts[name]["outputs"]) == [str(index) for index in range(len(cls.RETURN_TYPES))]
        assert texts[name]["display_name"]
        assert texts[name]["description"]
        for entry in (*texts[name]["inputs"].values(), *texts[name]["outputs"].values()):
            assert entry["name"]
            assert entry["tooltip"]


def test_chinese_texts_are_chinese():
    table = json.loads((ROOT / "locales/zh/texts.json").read_text("utf-8"))
    plain = [english for english, text in table["texts"].items() if not any("一" <= c <= "鿿" for c in text)]
    assert plain == []

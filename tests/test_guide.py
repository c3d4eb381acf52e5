"""What the guide says is tried as it is written."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from diffusion_trainer.models import families
from diffusion_trainer.scripts import headless
from diffusion_trainer.utils.config import write_toml
from diffusion_trainer.utils.user_settings import UserSettings

ROOT = Path(__file__).resolve().parent.parent
GUIDE = (ROOT / "docs/guide.md").read_text("utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
LOOK = """
import sys
sys.path.insert(0, sys.argv[1] + "/scripts")
import headless
nodes = headless.load_package().NODE_CLASS_MAPPINGS
cls = nodes["MyFluxModelNode"]
assert cls.INPUT_TYPES()["optional"]["style"][0] == "STRING"
print(cls().get_config(diffusers_path="/m", style="in oil")[0])
"""


def test_a_family_from_another_folder_has_a_node_and_trains(tmp_path):
    (tmp_path / "my_families").mkdir()
    (tmp_path / "my_families/my_flux.py").write_text(PYTHON[0])
    (tmp_path / "diffusion-trainer").mkdir()
    (tmp_path / "diffusion-trainer/settings.toml").write_text(f"family_folders = ['{tmp_path}/my_families']")
    environment = os.environ | {"XDG_CONFIG_HOME": str(tmp_path), "DS_ACCELERATOR": "cpu"}
    seen = subprocess.run([sys.executable, "-c", LOOK, str(ROOT)], env=environment, capture_output=True, text=True,
                          check=False)  # fmt: skip
    assert "'type': 'my_flux'" in seen.stdout and "'style': 'in oil'" in seen.stdout, seen.stderr[-2000:]

    model = families()["flux"].write_miniature(tmp_path / "model") | {"type": "my_flux", "style": "in oil"}
    (tmp_path / "pictures").mkdir()
    from PIL import Image

    Image.new("RGB", (64, 64), "red").save(tmp_path / "pictures/a.png")
    write_toml(tmp_path / "dataset.toml", {"resolutions": [64], "directory": [{"path": str(tmp_path / "pictures")}]})
    write_toml(tmp_path / "train.toml", {"output_dir": str(tmp_path / "out"), "max_steps": 1, "model": model,
               "adapter": {"type": "lora", "rank": 2}, "optimizer": {"type": "adamw", "lr": 1e-3}})  # fmt: skip
    done = subprocess.run([sys.executable, "train.py", "--config", str(tmp_path / "train.toml")], cwd=ROOT,
                          env=environment, capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    (run,) = (tmp_path / "out").glob("2*")
    assert json.loads((run / "status.json").read_text())["state"] == "finished"


def test_a_dataset_node_of_another_package_works(tmp_path):
    for name in ("input/style", "input/subject", "my_datasets"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "my_datasets/__init__.py").write_text(PYTHON[1])
    prompt = {
        "1": {"class_type": "StyleAndSubject", "inputs": {"style": "input/style", "subject": "input/subject"}},
        "2": {"class_type": "DatasetOptionsNode", "inputs": {"dataset_config": ["1", 0], "trigger_word": "ohwx"}},
        "3": {"class_type": "PreviewAny", "inputs": {"source": ["2", 0]}},
    }
    (tmp_path / "prompt.json").write_text(json.dumps(prompt))
    results = headless.run_file(tmp_path / "prompt.json", tmp_path, packages=[tmp_path / "my_datasets"])
    assert results["2"].outputs[0]["directory"][1] == {"path": "input/subject", "num_repeats": 4}
    with pytest.raises(headless.WorkflowError, match="is not the folder of a package"):
        headless.run_file(tmp_path / "prompt.json", tmp_path, packages=[tmp_path])


@pytest.mark.parametrize("name", ["docs/guide.md", "docs/guide.zh.md", "README.zh.md"])
def test_links_and_settings_are_right(name):
    text = (ROOT / name).read_text("utf-8")
    places = re.findall(r"\]\(([^)#]+)", text)
    missing = [place for place in places if "://" not in place and not (ROOT / name).parent.joinpath(place).exists()]
    assert missing == []
    for block in re.findall(r"```toml\n(.*?)```", text, re.DOTALL):
        if "_folders" in block:
            assert UserSettings.model_validate(tomllib.loads(block))


def test_the_languages_have_the_same_sections():
    english, chinese = ((ROOT / f"docs/{name}").read_text("utf-8") for name in ("guide.md", "guide.zh.md"))
    levels = [re.findall(r"^(#+) ", text, re.MULTILINE) for text in (english, chinese)]
    assert levels[0] == levels[1]

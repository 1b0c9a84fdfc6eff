import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from scripts.check_release import problems

ROOT = Path(__file__).parents[2]
URL = "https://github.com/somebody/smollm3-jax"


@pytest.fixture
def sound(tmp_path) -> Path:
    urls = f'[project.urls]\nRepository = "{URL}"\n'
    (tmp_path / "pyproject.toml").write_text(f'[project]\nname = "smollm3-jax"\nversion = "0.2.0"\n{urls}')
    (tmp_path / "CHANGELOG.md").write_text("# Changes\n\n## 0.2.0 (2027-01-31)\n\n- ...\n\n## 0.1.0 (2026-12-01)\n")
    (tmp_path / "CITATION.cff").write_text("title: smollm3-jax\nversion: 0.2.0\n")
    return tmp_path


def test_what_agrees_can_be_released(sound):
    assert problems("v0.2.0", URL, sound) == []


@pytest.mark.parametrize(
    "tag, file, old, new, said",
    [
        ("v0.1.0", "CHANGELOG.md", "", "", "it would have to be v0.2.0"),
        ("0.2.0", "CHANGELOG.md", "", "", "the tag is 0.2.0"),
        ("v0.2.0", "CHANGELOG.md", "## 0.2.0 (2027-01-31)", "## Unreleased", "newest heading is 'Unreleased'"),
        ("v0.2.0", "CHANGELOG.md", " (2027-01-31)", "", "newest heading is '0.2.0'"),
        ("v0.2.0", "CITATION.cff", "0.2.0", "0.1.0", "CITATION.cff has another version"),
        ("v0.2.0", "pyproject.toml", "somebody", "another", "it must be https://github.com/somebody"),
        ("v0.2.0", "pyproject.toml", "Repository", "Model", "Repository of pyproject.toml is None"),
    ],
)
def test_what_does_not_agree_is_said(sound, tag, file, old, new, said):
    text = (sound / file).read_text()
    assert old in text
    (sound / file).write_text(text.replace(old, new, 1))
    [found] = problems(tag, URL, sound)
    assert said in found


def test_this_repository_has_one_version():
    """Between releases the changelog's newest heading is "Unreleased", and nothing but that speaks against one."""
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version
    assert all("newest heading is 'Unreleased'" in found for found in problems(f"v{version[1]}"))


@pytest.mark.parametrize("workflow", sorted((ROOT / ".github" / "workflows").glob("*.yml")), ids=lambda path: path.stem)
def test_actions_of_others_are_pinned(workflow):
    """By commits, as a tag can be moved; each of them with its version beside it."""
    used = re.findall(r"uses: (.*)", workflow.read_text())
    assert used and all(re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", one) for one in used), used


def test_workflows_are_what_github_takes(tmp_path):
    """As its schema has it, which check-jsonschema brings."""
    pytest.importorskip("check_jsonschema")
    workflows = sorted(map(str, (ROOT / ".github" / "workflows").glob("*.yml")))
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows"]
    done = subprocess.run([*command, *workflows], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    odd = tmp_path / "odd.yml"
    odd.write_text(Path(workflows[0]).read_text().replace("runs-on", "runson"))
    assert subprocess.run([*command, str(odd)], capture_output=True).returncode == 1


def test_only_the_job_that_publishes_may_ask_for_identities():
    """And it runs no code of this repository; what it uploads has been tried before."""
    release = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())
    jobs = release["jobs"]
    assert release["permissions"] == {"contents": "read"}
    assert [name for name, job in jobs.items() if "id-token" in job.get("permissions", {})] == ["publish"]
    assert not [step for step in jobs["publish"]["steps"] if "run" in step]
    assert jobs["publish"]["needs"] == ["smoke", "test"] and jobs["smoke"]["needs"] == "build"
    assert [step["run"] for step in jobs["test"]["steps"] if "run" in step] == ["make test"]
    for script in re.findall(r"scripts/\w+\.py", str(jobs)):
        assert (ROOT / script).is_file()

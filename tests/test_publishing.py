"""The workflow that publishes: what it runs is pinned, and one step is given the registry's token."""

import re

import pytest
from support import ROOT

yaml = pytest.importorskip("yaml")

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def steps(path):
    return [step for job in yaml.safe_load(path.read_text())["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_actions_are_pinned_by_commit(path):
    used = [step["uses"] for step in steps(path) if "uses" in step]
    assert used and all(re.fullmatch(r"actions/[\w-]+@[0-9a-f]{40}", name) for name in used), used


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_the_token_is_in_the_environment_of_the_step_that_needs_it(path):
    """Never in the text of a command, and with no action."""
    given = [step for step in steps(path) if "secrets." in str(step)]
    assert path.read_text().count("secrets.") == len(given) == (path.stem == "publish")
    for step in given:
        assert "uses" not in step and "secrets." not in step["run"] and "secrets." in step["env"]["TOKEN"]


def test_what_is_installed_to_publish_is_pinned_by_hash():
    installs = [
        step["run"] for step in steps(ROOT / ".github/workflows/publish.yml") if "install" in step.get("run", "")
    ]
    assert [run.strip() for run in installs] == [
        "pip install --require-hashes --no-deps --only-binary :all: -r .github/publish.txt"
    ]
    lines = [x for x in (ROOT / ".github/publish.txt").read_text().splitlines() if not x.startswith("#")]
    assert len(lines) > 20 and any(line.startswith("comfy-cli==") for line in lines)
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+ --hash=sha256:[0-9a-f]{64}", line) for line in lines)

